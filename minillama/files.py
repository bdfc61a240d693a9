"""Files written whole or not at all, and JSON."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from minillama.distributed import on_rank_zero, patient_group
from minillama.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def cache_folder(given: Path | None = None) -> Path:
    """Where minillama keeps what it can make again: `given`, or minillama in $XDG_CACHE_HOME or ~/.cache."""
    return given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillama"


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
