"""Files written whole or not at all, and JSON, which may hold anything."""

import json
import math
import os
import reprlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from minillama.distributed import on_rank_zero, patient_group
from minillama.errors import UserError

DEPTH = 64
"""Lists and objects inside each other, beyond which JSON is not used: to go through it could exhaust Python's stack."""


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    if is_deep(content):
        raise UserError(f"{path} cannot be read: more than {DEPTH} lists and objects inside each other")
    return content


def cache_folder(given: Path | None = None) -> Path:
    """Where minillama keeps what it can make again: `given`, or minillama in $XDG_CACHE_HOME or ~/.cache."""
    return given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillama"


def is_deep(value: Any) -> bool:
    """Whether lists and objects stand in each other more than DEPTH times."""
    inside = [value]
    for _ in range(DEPTH):
        inside = [
            one for v in inside if isinstance(v, (dict, list)) for one in (v.values() if isinstance(v, dict) else v)
        ]
        if not inside:
            return False
    return any(isinstance(v, (dict, list)) for v in inside)


def misfit(value: Any, shape: Any, name: str) -> str | None:
    """What is wrong with a value that was read from JSON, called `name`; None if it has this shape.

    shape: a type, where float is any finite number, and int one of 64 bits; {key: shape}, what must be there, or
    {...: shape}, where the keys are free; [shape], a list of such; (shape, shape), either; else the value itself.
    """
    if isinstance(shape, tuple):
        problems = [misfit(value, one, name) for one in shape]
        return None if None in problems else problems[-1]
    if isinstance(shape, dict) and isinstance(value, dict):
        shapes = dict.fromkeys(value, shape[...]) if ... in shape else shape
        if missing := shapes.keys() - value.keys():
            return f"{name} has no {min(missing)!r}"
        inside = [(value[key], one, f"{name}[{reprlib.repr(key)}]") for key, one in shapes.items()]
        return next(filter(None, (misfit(*one) for one in inside)), None)
    if isinstance(shape, list) and isinstance(value, list):
        return next(filter(None, (misfit(one, shape[0], f"{name}[{i}]") for i, one in enumerate(value))), None)
    if shape is float:
        fits = (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**63)
    elif isinstance(shape, type):
        fits = type(value) is shape and (not isinstance(value, int) or abs(value) < 2**63)
    else:
        fits = type(value) is type(shape) and value == shape
    return None if fits else f"{name} is {reprlib.repr(value)}"


def is_plain(name: Any) -> bool:
    """Whether a file name that was read from a file stays in its folder: it is no path, and nothing special."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


@contextmanager
def new_folder(folder: Path, mark: str) -> Iterator[tuple[Path, Callable[..., None]]]:
    """Makes `folder` whole or not at all. Every rank must enter it, and make the same calls.

    Gives the path to write to, and a function that calls another one on rank 0 while the others wait. If that fails,
    every rank raises UserError: none is left waiting in the next collective. At the end the path takes `folder`'s place.
    A folder that holds something, but no file `mark`, is none of ours: an error, never replaced.
    """
    folder = folder.resolve()
    path, old = (folder.with_name(f".{folder.name}.minillama-{what}") for what in ("partial", "replaced"))
    begun = False
    patient = patient_group() if dist.is_initialized() else None

    def on_disk(function: Callable[..., object], *args: Any) -> None:
        def attempt() -> None:
            try:
                function(*args)
            except OSError as error:
                raise UserError(f"{folder} cannot be written: {error}") from None

        if dist.is_initialized():
            on_rank_zero(attempt, patient)
        else:
            attempt()

    def begin() -> None:
        nonlocal begun
        if os.path.ismount(folder):
            raise UserError(f"{folder} is a mount point, which cannot be replaced: name a folder in it")
        if folder.exists() and any(folder.iterdir()) and not (folder / mark).exists():
            raise UserError(f"{folder} holds other files: give a new folder, or one to replace that has {mark}")
        shutil.rmtree(path, ignore_errors=True)  # of a run that was killed
        path.mkdir(parents=True)
        begun = True

    def finish() -> None:
        nonlocal begun
        begun = False  # from here on it is whole: kept, whatever goes wrong
        try:
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)  # not removed before the new one is in its place
            path.rename(folder)
        except OSError as error:
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
        if patient is not None:
            dist.destroy_process_group(patient)


def check_unused(target: Path, *sources: Path) -> None:
    """Raises UserError unless a tool may write to this folder: one that does not exist, or is empty, and that is in none
    of those it reads."""
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
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_rank_zero() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
