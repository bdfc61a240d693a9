"""Files written whole or not at all, and JSON that is not trusted."""

import errno
import glob
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch.distributed as dist

from minillama.errors import FULL, UserError, disk_text, json_problem
from minillama.parallel.processes import group_without_timeout, local_world_size, on_rank_zero, process_count

PARTIAL = ".minillama-partial"
"""Suffix of files and folders that are not complete"""
DEPTH = 64
"""Depth of nested lists and objects beyond which JSON is refused: a walk over it could exhaust Python's stack."""


def open_file(path: Path) -> BinaryIO:
    """The file, open for reading. Raises UserError if it cannot be opened, and for a FIFO or a device, which could block."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path} is a pipe or a device: give a file")
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(disk_text(error, path, "cannot be read")) from None


_received: dict[Path, bytes] = {}
"""What read_for_all has read"""


def read_for_all(folder: Path, names: Collection[str]) -> None:
    """Reads small files of a folder, those that are there, on rank 0, for read_bytes and read_json of all ranks.

    Else the processes of all machines would ask the one disk for the same files. On one machine nothing is done. Every rank
    must call it.
    """
    if process_count() > local_world_size():
        found = on_rank_zero(lambda: {n: (folder / n).read_bytes() for n in names if (folder / n).is_file()})
        _received.update({folder / name: content for name, content in found.items()})


def read_bytes(path: Path) -> bytes:
    """All of a file. Raises UserError as open_file does."""
    if path in _received:
        return _received[path]
    with open_file(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise UserError(disk_text(error, path, "cannot be read")) from None


def regular(file: Path) -> Path:
    """The file, open. Raises FileNotFoundError for what is no regular file, such as a FIFO, which would block."""
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    return file


def described(file: Path) -> dict[str, Any]:
    """Its size and hash."""
    with regular(file).open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size  # of the open file: the size by name may be cached
        return {"bytes": size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def read_any_json(path: Path) -> Any:
    """What a JSON file holds. Raises UserError, naming it, if it is not JSON or is nested too deeply."""
    text = ""
    try:
        text = read_bytes(path).decode("utf-8")
        content = json.loads(text)
    except UnicodeDecodeError:
        raise UserError(f"{path} cannot be read: it is not JSON, nor any other text in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {json_problem(text, error)}") from None
    if is_deep(content):
        raise UserError(f"{path} cannot be read: more than {DEPTH} lists and objects inside each other")
    return content


def read_json(path: Path, shape: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The object that a JSON file holds. shape: of its values, as in misfit, if they are there and not null.

    Raises UserError: "FILE: KEY must be ...".
    """
    content = read_any_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    given = {key: one for key, one in (shape or {}).items() if content.get(key) is not None}
    if problem := misfit(content, given):
        raise UserError(f"{path}: {problem}")
    return content


def cache_folder(given: Path | None = None) -> Path:
    """Where minillama caches things: `given`, or minillama in $XDG_CACHE_HOME or ~/.cache.

    Raises UserError where there is no home.
    """
    try:
        return given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillama"
    except RuntimeError:
        raise UserError("there is no home folder to keep data in: set HOME, or XDG_CACHE_HOME to another") from None


def is_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than DEPTH times."""
    inside = [value]
    for _ in range(DEPTH):
        inside = [
            one for v in inside if isinstance(v, (dict, list)) for one in (v.values() if isinstance(v, dict) else v)
        ]
        if not inside:
            return False
    return any(isinstance(v, (dict, list)) for v in inside)


def misfit(value: Any, shape: Any, name: str = "") -> str | None:
    """What is wrong with a value that was read from JSON, "KEY must be ..."; None if it has this shape.

    shape: a type, where float is any finite number, and int one of 64 bits; {key: shape}, what must be there, or
    {...: shape}, where the keys are free; [shape], a list of such; (shape, shape), either; else the value itself.
    """
    if isinstance(shape, tuple):
        problems = [misfit(value, one, name) for one in shape]
        return None if None in problems else _must_be(value, shape, name)
    if isinstance(shape, dict) and isinstance(value, dict):
        shapes = dict.fromkeys(value, shape[...]) if ... in shape else shape
        inside = {key: f"{name}.{key}" if name else str(key) for key in shapes}
        if missing := shapes.keys() - value.keys():
            return f"{inside[min(missing)]} is missing"
        return next(filter(None, (misfit(value[key], one, inside[key]) for key, one in shapes.items())), None)
    if isinstance(shape, list) and isinstance(value, list):
        return next(filter(None, (misfit(one, shape[0], f"{name}[{i}]") for i, one in enumerate(value))), None)
    if shape is float:
        fits = (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**63)
    elif isinstance(shape, type):
        fits = type(value) is shape and (not isinstance(value, int) or abs(value) < 2**63)
    else:
        fits = type(value) is type(shape) and value == shape
    return None if fits else _must_be(value, shape, name)


def _must_be(value: Any, shape: Any, name: str) -> str:
    kinds = {int: "a whole number", float: "a number", str: "text", bool: "true or false", None: "null"}

    def words(one: Any) -> str:
        if isinstance(one, list):
            return f"a list of {words(one[0])}"
        return "an object" if isinstance(one, dict) else kinds.get(one) or json.dumps(one)

    found = json.dumps(value, default=str)
    found = found if len(found) < 60 else f"{found[:60]}..."
    wanted = " or ".join(map(words, shape if isinstance(shape, tuple) else (shape,)))
    return f"{name or 'it'} must be {wanted}, found {found}"


def is_plain(name: Any) -> bool:
    """Whether a file name that was read from a file stays in its folder: no path, no special name."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def lock(folder: Path) -> int | None:
    """Locks a folder until the descriptor that it returns is closed, or this process ends in any way.

    None where the file system has no locks. Raises BlockingIOError if another process has locked it.
    """
    import fcntl  # not on Windows, where only CUDA is of use

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None


def _new_partial(folder: Path) -> tuple[Path, int | None]:
    """A folder beside `folder` for one process alone, locked. Removes those of processes that were killed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*{PARTIAL}"):
        with suppress(OSError):  # in use; or no folder, so not ours
            if (descriptor := lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(descriptor)
    path = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    path.mkdir()  # fails where anything is, a link too
    return path, lock(path)


@contextmanager
def new_folder(folder: Path, mark: str) -> Iterator[tuple[Path, Callable[..., None]]]:
    """Makes `folder` whole or not at all. Every rank must enter it, and make the same calls.

    Gives the path to write to, and a function that calls another one on rank 0 while the others wait. If that fails,
    every rank raises UserError: none is left waiting in the next collective. At the end the path takes `folder`'s place,
    unless another process has written `folder` meanwhile. A folder that is not empty and has no file `mark` is not ours:
    an error, and it is not replaced.
    """
    folder = folder.resolve()
    path, locked, before, begun = folder, None, None, False
    patient = group_without_timeout() if dist.is_initialized() else None

    def on_disk(function: Callable[..., object], *args: Any) -> None:
        def attempt() -> None:
            try:
                function(*args)
            except OSError as error:
                within = str(error.filename or path).startswith(str(path.parent))
                problem = "" if within else f"{folder} is not written: "
                name, what = (folder, "cannot be written") if within else (None, "cannot be read")
                raise UserError(problem + disk_text(error, name, what)) from None

        if dist.is_initialized():
            on_rank_zero(attempt, patient)
        else:
            attempt()

    def begin() -> None:
        nonlocal path, locked, before, begun
        if os.path.ismount(folder):
            raise UserError(f"{folder} is a mount point, which cannot be replaced: name a folder in it")
        if folder.exists() and any(folder.iterdir()) and not (folder / mark).exists():
            raise UserError(f"{folder} holds other files: give a new folder, or one to replace that has {mark}")
        before = _identity(folder)
        path, locked = _new_partial(folder)
        begun = True

    def finish() -> None:
        nonlocal begun
        meanwhile = UserError(f"another process has written {folder} meanwhile, and that stays: name another target")
        if _identity(folder) != before:
            raise meanwhile
        begun = False  # from here on it is whole, and is kept if anything goes wrong
        old = path.with_name(path.name.replace(PARTIAL, ".minillama-replaced"))
        try:
            if before:
                folder.rename(old)  # not removed before the new one is in its place
            path.rename(folder)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):  # since the check above
                begun = True
                shutil.rmtree(old, ignore_errors=True)
                raise meanwhile from None
            raise UserError(f"{path} is complete, but could not be renamed to {folder.name}: {error}") from None
        shutil.rmtree(old, ignore_errors=True)

    try:
        on_disk(begin)
        yield path, on_disk
        on_disk(finish)
    except BaseException:
        if begun:
            shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        if locked is not None:
            os.close(locked)
        if patient is not None:
            dist.destroy_process_group(patient)


def _identity(folder: Path) -> tuple[int, int] | None:
    """Identifies a folder, also against one that replaces it and may get the same inode; None if there is none."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all; on failure the old file stays. Raises OSError with the file's name."""
    content = content.encode() if isinstance(content, str) else content
    new = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        with new.open("xb") as opened:  # fails where anything is, a link too
            opened.write(content)
        new.replace(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def room_for(size: int, folder: Path) -> Iterator[None]:
    """Around writing so many bytes into a folder: the OSError of a full disk says how many are needed.

    Raises one before anything is written if the disk has not that many.
    """
    needed = f"{size_text(size)} are needed"
    try:
        if (free := shutil.disk_usage(folder).free) < size:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {size_text(free)} are free", str(folder))
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(error.errno, f"{error.strerror}; {needed}", error.filename or str(folder)) from None


def check_unused(target: Path, *sources: Path) -> None:
    """Raises UserError unless a tool may write to this folder: it must be empty or not exist, and be in none of the
    folders that the tool reads."""
    for source in sources:
        if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
            raise UserError(f"{target} is in {source}, which is read: name a target elsewhere")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already; name another target, or remove it first")


def size_text(size: int) -> str:
    """Bytes in GB, or in MB where that would be less than a tenth."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def folder_size(folder: Path) -> int:
    """Bytes of the files in it."""
    return sum(file.stat().st_size for file in folder.iterdir())


def write_json(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, json.dumps(content, indent=2, sort_keys=True) + "\n")
