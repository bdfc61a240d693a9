"""The output folder: whose it is, and run.json."""

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minillama.data.packing import Packed
from minillama.errors import UserError, disk_text
from minillama.files import described, lock, read_json, write_whole
from minillama.formats.hf import weights_fingerprint
from minillama.formats.hub import model_name
from minillama.parallel.processes import first_of_ranks, local_world_size, on_rank_zero, say, texts_on_rank_zero
from minillama.training.config import RunConfig
from minillama.training.flag_changes import compare_flags
from minillama.training.plan import Progress, count_steps
from minillama.training.resume import WAITS, Checkpoint, find_checkpoint, has_checkpoint, saved_steps


def find_start(config: RunConfig) -> Checkpoint | None:
    """The checkpoint to resume from, read through and sound; None to start from the base model. Every rank must call it.

    Raises UserError for --resume DIR without a sound one.
    """
    resume, agents = config.resume, _agents()
    if on_rank_zero(lambda: _before(config.output_dir, agents) is not None and has_checkpoint(config.output_dir)):
        resume = "auto"
    return None if resume == "none" else find_checkpoint(resume, config.output_dir)


def _agents() -> list[int]:
    """On rank 0, for each machine's torchrun, or for another launch of these processes, a number that no other has.

    Every rank must call it.
    """
    launch: list[Any] = [uuid.uuid4()]
    if run_id := os.environ.get("TORCHELASTIC_RUN_ID"):
        launch = [socket.gethostname(), os.getppid(), run_id]
        with suppress(OSError):  # since when it runs: in a container its process may always have the same number
            launch += Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19:20]
    digest = hashlib.blake2b(str(launch).encode(), digest_size=8).digest()
    return sorted({*map(int, texts_on_rank_zero(str(int.from_bytes(digest, signed=True))))})


def _before(output_dir: Path, agents: list[int]) -> dict[str, Any] | None:
    """run.json of the same run, if torchrun has restarted it: then it goes on, whatever --resume says.

    torchrun restarts all ranks when one has failed, or when a machine comes back or is lost: one of its agents was there
    before, though rank 0 may have moved to another machine.
    """
    file = output_dir / "run.json"
    run = read_json(file, {"agents": [int], "packs_per_step": int}) if file.exists() else {}
    return run if {*agents} & {*run.get("agents", ())} else None


def start_run(config: RunConfig, train: Packed, checkpoint: Checkpoint | None) -> tuple[Progress, dict[str, str]]:
    """Makes the output folder and writes run.json: the resolved flags and what they run on. Every rank must call it.

    Returns where the run starts, and the fingerprints of base model and data.

    Raises UserError if the folder cannot be written or holds a run that is not to be resumed, and for a checkpoint of a
    run that this one could not continue.
    """
    output_dir, resume, agents = config.output_dir, config.resume, _agents()
    before = on_rank_zero(lambda: _before(output_dir, agents))
    fingerprints = {
        "model": on_rank_zero(lambda: weights_fingerprint(config.model)),
        "data": train.fingerprint,
    }
    lines = []
    if checkpoint is None:
        progress = config.train.begin(dist.get_world_size())
        if before:  # on as many machines as there were
            progress = replace(progress, packs_per_step=before["packs_per_step"])
    else:
        progress = checkpoint.progress
        lines = compare_flags(config, checkpoint, fingerprints)
    total = count_steps(train, config.train, progress.packs_per_step)
    if checkpoint and total < progress.step:
        raise UserError(
            f"{checkpoint.folder} is after step {progress.step}, and this run would end after step {total}: raise "
            "--train.max-steps or --train.epochs, or resume from an earlier checkpoint"
        )
    if checkpoint and total == progress.step:
        lines.append("finished    all steps are done: raise --train.epochs or --train.max-steps to train on")
    config.profile.check_steps(total - progress.step)
    config.profile.make_folders()

    def write() -> dict[str, Any]:
        run, file = _about(config, train, checkpoint), output_dir / "run.json"
        run |= {"packs_per_step": progress.packs_per_step, "agents": agents}
        try:
            if there := output_dir.is_dir():
                _claim(output_dir.resolve(), restarted=before is not None)
            continues = before is not None or _continues(output_dir, resume, checkpoint)
            if not there:
                output_dir.mkdir(parents=True, exist_ok=True)
                _claim(output_dir.resolve())
            if continues and file.exists():
                run["id"] = read_json(file).get("id", run["id"])
            write_whole(file, json.dumps(run, indent=2, default=str) + "\n")
            return described(file)
        except OSError as error:
            raise UserError(disk_text(error, f"--output-dir {output_dir}", "cannot be written")) from None

    _check_shared(output_dir, on_rank_zero(write))
    for line in lines:
        say(line)
    return progress, fingerprints


def _check_shared(output_dir: Path, written: dict[str, Any]) -> None:
    """Raises UserError, on every rank, unless each machine sees the run.json that rank 0 has just written.

    written: what rank 0 has seen of it.
    """
    if local_world_size() == dist.get_world_size():
        return
    for wait in (*WAITS, None):
        seen = os.environ.get("LOCAL_RANK") != "0"
        with suppress(OSError):
            seen = seen or described(output_dir / "run.json") == written
        unseen = first_of_ranks(None if seen else dist.get_rank())
        if unseen is None:
            return
        if wait:
            time.sleep(wait)
    raise UserError(
        f"--output-dir {output_dir} is not the same folder on the machine of rank {unseen} as on that of rank 0: name "
        "one on a disk that all machines share"
    )


def _about(config: RunConfig, train: Packed, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What run.json says."""
    efficiency = train.efficiency(config.train.batch_size, dist.get_world_size(), config.train.accumulate)
    return {
        "id": uuid.uuid4().hex,
        "command": sys.argv,
        "flags": asdict(config) | {"model": model_name(config.model)},
        "model_folder": config.model.resolve(),
        "data": {"tokens": train.tokens, "packs": len(train), "efficiency": round(efficiency, 4)},
        "world_size": dist.get_world_size(),
        "resumed_from": checkpoint and checkpoint.folder,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "minillama": version("minillama"),
        },
        "git_commit": _git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


_locks: dict[Path, int | None] = {}
"""Of the folders that this process writes to"""


def _claim(folder: Path, restarted: bool = False) -> None:
    """Locks the folder until this process ends. Raises UserError if another process has locked it.

    restarted: the other process is one of this run, on a machine that is lost, frozen or cut off, and may never end.
    """
    try:
        if folder not in _locks:
            _locks[folder] = lock(folder)
    except BlockingIOError:
        if restarted:
            return
        raise UserError(f"another run is writing to {folder}: wait for its end, or give another --output-dir") from None


def _continues(output_dir: Path, resume: str, checkpoint: Checkpoint | None) -> bool:
    """Whether the run that output_dir holds, if any, is the one that goes on. Raises UserError if it must not."""
    metrics = output_dir / "metrics.jsonl"
    finished = (output_dir / "adapter").exists() or (output_dir / "model").exists()
    trained = metrics.exists() and '"loss"' in metrics.read_text()
    if checkpoint is not None and checkpoint.folder.resolve().parent == (output_dir / "checkpoints").resolve():
        if newer := [step for step in saved_steps(output_dir) if step > checkpoint.progress.step]:
            raise UserError(
                f"--resume {resume}: {output_dir} holds a newer checkpoint, of step {newer[-1]}: remove it, or give "
                "another --output-dir"
            )
        return True
    if resume == "auto" and not finished:  # stopped before its first checkpoint: it starts again
        return True
    if finished or trained or has_checkpoint(output_dir):
        raise UserError(
            f"{output_dir} already holds a run: go on with it by --resume auto, if it has a checkpoint, give another "
            "--output-dir, or remove that folder"
        )
    return False


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
