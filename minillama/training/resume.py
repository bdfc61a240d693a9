"""The checkpoint to resume from: found, read and verified before anything of it is used."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from stat import S_ISREG
from typing import Any, TypeVar

import torch.distributed as dist

from minillama.errors import UserError
from minillama.files import described, is_deep, is_plain, misfit, regular
from minillama.parallel.processes import all_reduce, first_of_ranks, on_rank_zero, say
from minillama.training.checkpoint_index import INDEX
from minillama.training.plan import Progress

T = TypeVar("T")
MANIFEST = "checkpoint.json"
"""Written last: what a checkpoint holds, with the size and the hash of each file, and a hash of itself."""
WAITS = (1, 2, 4, 8, 16, 32)
"""Seconds between tries to find or read a file: together more than the minute for which NFS may show old contents"""
COUNTS = ("step", "epoch", "cursor", "tokens")
SHAPE = {
    "files": {...: {"bytes": int, "sha256": str}},
    "format": ("sharded", "full"),
    "world_size": int,
    "device": ("cpu", "cuda"),
    "attention": (None, str),
    "optimizer": bool,
    "scaler": (None, {"scale": float, "finite_steps": int}),
    "best": (None, [float]),
    "progress": {**dict.fromkeys(("packs_per_step", *COUNTS), int), "unlogged": [float], "evaluate": bool},
    "flags": {"model": str, "tokenizer": (None, str), "train": {"batch_size": int, "accumulate": int}},
    "fingerprints": {"model": str, "data": str},
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk that was verified."""

    folder: Path
    content: dict[str, Any]
    """Of checkpoint.json"""

    @property
    def progress(self) -> Progress:
        saved = {field.name: self.content["progress"][field.name] for field in fields(Progress)}
        return Progress(**saved | {"unlogged": tuple(saved["unlogged"])})

    def attention(self, device: str) -> str | None:
        """The attention it was made with, if on the same kind of device: one that is fast on a CPU is slow on a GPU."""
        return self.content["attention"] if self.content["device"] == device else None


def find_checkpoint(resume: str, output_dir: Path) -> Checkpoint | None:
    """The verified checkpoint that --resume asks for. auto: the newest of output_dir, or None if there is none yet.

    Otherwise `resume` is the folder of a checkpoint, or of a run, whose newest it takes. Every rank must call it.
    Raises UserError, on every rank, for a folder without a sound checkpoint, and for one that a rank cannot read.
    """
    folder = output_dir if resume == "auto" else Path(resume)
    candidates = on_rank_zero(lambda: _candidates(folder))
    if not candidates and resume == "auto":
        return None
    if not candidates:
        raise UserError(f"--resume {resume}: there is no checkpoint; give the folder of one, or of a run, or auto")
    problems: list[tuple[Path, str]] = []
    for candidate in candidates:
        content, problem = _inspect(candidate)
        if problem is None:
            for path, problem in problems:
                say(f"checkpoint {path} is damaged: {problem}")
            if resume == "auto":
                on_rank_zero(lambda: _set_aside([path for path, _ in problems]))
            return Checkpoint(candidate, content)
        problems.append((candidate, problem))
    raise UserError(
        f"no checkpoint of {folder} is sound: {'; '.join(f'{path.name}: {problem}' for path, problem in problems)}; "
        "to start from scratch, remove them"
    )


def _candidates(folder: Path) -> list[Path]:
    """The folder itself if it is a checkpoint, else those of a run, newest first."""
    if (folder / MANIFEST).exists() or (folder.name.startswith("step-") and folder.is_dir()):
        return [folder]
    return list(reversed(saved_steps(folder).values()))


def has_checkpoint(output_dir: Path) -> bool:
    return bool(saved_steps(output_dir))


def saved_steps(output_dir: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, in order. Unfinished ones have other names."""
    folder = output_dir / "checkpoints"
    paths = folder.iterdir() if folder.is_dir() else ()
    names = ((path, path.name.removeprefix("step-")) for path in paths if path.name.startswith("step-"))
    found = {int(number): path for path, number in names if number.isdecimal()}
    return dict(sorted(found.items()))


def _set_aside(damaged: list[Path]) -> None:
    """Renames damaged checkpoints, so that they neither count as the newest nor push out sound ones."""
    for path in damaged:
        aside = path.with_name(path.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        say(f"renamed it to {aside.name}")


def _inspect(folder: Path) -> tuple[dict[str, Any], str | None]:
    """(checkpoint.json, what is wrong): all files are read and hashed, each by one of the ranks.

    Damaged is a file that no rank has, and one with another hash. If only some ranks cannot see or read a file, that
    proves no damage: raises UserError, on every rank, if it stays so.
    """
    if problem := _missing(folder, [MANIFEST]):
        return {}, f"{problem}, so it was not written to its end"
    content, problem = on_rank_zero(lambda: _manifest_or_damage(folder))
    problem = problem or _missing(folder, sorted(content["files"]))
    if problem:
        return content, problem
    damage = unreadable = None
    for name in _share(sorted(content["files"])):
        try:
            damage = damage or damage_of(folder, name, content["files"][name])
        except OSError as error:
            unreadable = _reason(error), name, dist.get_rank()
    if damage := first_of_ranks(damage):
        return content, damage
    if failed := first_of_ranks(unreadable):
        raise UserError(unreadable_text(folder, *failed))
    return content, None


def _share(names: list[str]) -> list[str]:
    """This rank's part of the files, so that each is looked at by one rank."""
    return names[dist.get_rank() :: dist.get_world_size()]


def unreadable_text(folder: Path, problem: str, name: str, rank: int = 0) -> str:
    return (
        f"{folder / name} cannot be read on rank {rank} ({problem}), which does not prove it damaged: the checkpoint is "
        "left as it is; see to the disk, which all machines must share, and give the same command again"
    )


def _missing(folder: Path, names: list[str]) -> str | None:
    """What to say of a file that no rank has after several tries; None if all are there in the end.

    Each rank looks for its part of them, and for the first. Raises UserError if only some ranks see a file.
    """
    mine = dict.fromkeys([*_share(names), *names[:1]])
    for tries, wait in enumerate((*WAITS, None)):
        unseen = [(what, name, dist.get_rank()) for name in mine if (what := _unseen(folder / name))]
        absent = first_of_ranks(next((found for found in unseen if found[0] == ABSENT), None))
        found = absent or first_of_ranks(next(iter(unseen), None))
        if not found:
            return None
        what, name, rank = found
        if wait is None:
            break
        if tries == 0:
            say(f"{folder / name} is not to be seen everywhere: looking again, for a minute")
        time.sleep(wait)
    [seen] = all_reduce([_unseen(folder / name) != ABSENT])
    if not seen:
        return f"{name} is missing"
    raise UserError(unreadable_text(folder, what, name, rank))


ABSENT = "not there"


def _unseen(file: Path) -> str:
    """Why a file cannot be seen; "" if it can."""
    try:
        return "" if S_ISREG(file.stat().st_mode) else ABSENT
    except FileNotFoundError:
        return ABSENT
    except OSError as error:
        return _reason(error)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _manifest_or_damage(folder: Path) -> tuple[dict[str, Any], str | None]:
    try:
        return read_manifest(folder), None
    except CorruptCheckpoint as error:
        return {}, str(error)


class CorruptCheckpoint(Exception):
    pass


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of checkpoint.json.

    Raises CorruptCheckpoint unless it has its own hash, UserError for one that we did not write.
    """
    text = patiently(lambda: regular(folder / MANIFEST).read_bytes())
    try:
        content = json.loads(text)
        content = content if isinstance(content, dict) and not is_deep(content) else {}
        intact = content.pop("sha256", None) == hash_of(content)
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise CorruptCheckpoint(f"{MANIFEST} was changed after it was written")
    if problem := misfit(content, SHAPE) or _unfit(folder, content):
        raise UserError(f"{folder / MANIFEST} is none that this version of minillama wrote: {problem}")
    return content


def _unfit(folder: Path, content: dict[str, Any]) -> str | None:
    """What is wrong with a checkpoint.json of the right shape."""
    progress, files = content["progress"], content["files"]
    if progress["packs_per_step"] < 1 or min(progress[name] for name in COUNTS) < 0 or len(progress["unlogged"]) < 5:
        return f"its progress is {progress}"
    if len(content["best"] or (0, 0)) != 2 or content["world_size"] < 1:
        return f"its best is {content['best']}, its world_size {content['world_size']}"
    if paths := [name for name in files if not all(map(is_plain, name.split("/")))]:
        return f"it names {paths[0]!r}, and files outside the folder are not read"
    if content["format"] == "sharded" and INDEX not in files:
        return f"it has no {INDEX}: older versions had an index that could run code, and is not read any more"
    there = (str(file.relative_to(folder)) for file in folder.rglob("*.safetensors"))
    if more := [name for name in there if name not in files]:
        return f"it does not name {more[0]}, which is there: remove that file"
    return None


def hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def damage_of(folder: Path, name: str, wanted: dict[str, Any]) -> str | None:
    """What is wrong with a file. Raises OSError if it cannot be read, after several tries."""
    found = patiently(lambda: described(folder / name))
    if found["bytes"] != wanted["bytes"]:
        return f"{name} has {found['bytes']} bytes, not the {wanted['bytes']} that were written"
    return None if found == wanted else f"{name} was changed after it was written"


def patiently(read: Callable[[], T]) -> T:
    """What `read` returns, after several tries if needed: shared disks fail for moments and recover.

    Raises OSError if it keeps failing, and at once for a file that does not exist or may not be read.
    """
    for wait in WAITS:
        try:
            return read()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            time.sleep(wait)
    return read()
