"""Folders of the cache: built once, by one process of a machine while the others wait, and verified when they are used."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minillama.errors import REMEDIES, UserError, disk_text
from minillama.files import described, read_json, write_json
from minillama.parallel.processes import warn


def describe(folder: Path, kinds: dict[str, Any], about: dict[str, Any]) -> None:
    files = {f"{name}.bin": described(folder / f"{name}.bin") for name in kinds}
    if (refused := folder / "refused.txt").exists():
        files |= {refused.name: described(refused)}
    write_json(folder / "about.json", about | {"files": files})


def _problem_of(folder: Path) -> str | None:
    """What is wrong with an existing folder: all files in it are read and hashed."""
    try:
        about = read_json(folder / "about.json", {"files": {...: {"bytes": int, "sha256": str}}})
        for name, wanted in about["files"].items():
            if described(folder / name) != wanted:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (KeyError, UserError) as error:
        return str(error)
    return None


def built(folder: Path, build: Callable[[Path], None]) -> Path:
    """The folder, filled by `build` under another name first, in this process or another."""
    if is_sound(folder):
        return folder
    part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock")) as locked:
            if folder.exists() and _problem_of(folder) is None:  # now
                return folder
            if folder.exists():  # runs that have mapped it keep their data
                folder.rename(folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part"))
            for left in folder.parent.glob(f"{folder.name}.*.part") if locked else ():
                shutil.rmtree(left, ignore_errors=True)  # its builder was killed
            part.mkdir()
            build(part)
            for file in part.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            part.rename(folder)
    except OSError as error:
        if folder.exists():  # no locks here, and another process was faster
            return folder
        where = Path(error.filename or folder)  # a file that was open has no name: a full disk
        unnamed = error.filename is None and error.errno not in REMEDIES
        if unnamed or not (where.is_relative_to(folder.parent) or folder.is_relative_to(where)):
            raise
        text = disk_text(error, folder.parent, "cannot be written")
        besides = ", or" if error.errno in REMEDIES else ":"
        raise UserError(f"{text}{besides} give another place by --data.cache-dir or XDG_CACHE_HOME") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def is_sound(folder: Path) -> bool:
    if not folder.exists():
        return False
    if problem := _problem_of(folder):
        warn(f"the data in {folder} was changed, or its disk is failing ({problem}): it is made again")
    return problem is None


@contextmanager
def _locked(file: Path) -> Iterator[bool]:
    """Waits for its turn; yields whether there are locks on this file system."""
    import fcntl  # not on Windows, where only CUDA is of use

    with os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
