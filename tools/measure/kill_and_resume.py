"""Kills random processes of a run at random times, starts it again, and compares the result with an undisturbed run's.

    python tools/measure/kill_and_resume.py --folder /tmp/kills --model DIR
    python tools/measure/kill_and_resume.py --folder /tmp/kills --model DIR --recipe recipes/full_fsdp.py --flags="..."

Both runs are the same command under torchrun, the disturbed one with --resume auto. Says what the kills hit, and whether
every checkpoint that was complete survived them; then compares parameters, optimizer state and metrics, bit for bit.
Exit code 1 if anything differs.
"""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from minillama.files import check_unused
from minillama.help import filled
from minillama.parallel.failures import user_errors

MEASURED = {"tokens_per_s", "tflops", "mfu", "peak_memory_gib", "data_wait_s"}


@dataclass(frozen=True)
class Kills:
    """Kill and resume."""

    folder: Path
    """A new folder, for what the two runs leave"""
    model: Path
    """A small model, or it takes long"""
    recipe: Path = Path("recipes/lora_fsdp.py")
    kills: int = 50
    processes: int = 2
    seed: int = 0
    longest: float = 9.0
    """Seconds after the start of a run within which it is killed"""
    flags: str = "--train.epochs 60 --checkpoint.every 2 --train.batch-size 1 --data.context-length 256 --optim.lr 1e-3"
    """Flags of the recipe, besides the model, the output folder and the device"""


def start(args: Kills, out: Path, *more: str) -> subprocess.Popen:
    launch = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", str(args.processes), str(args.recipe)]
    flags = ["--model", str(args.model), "--output-dir", str(out), "--device", "cpu", *shlex.split(args.flags), *more]
    with out.with_suffix(".log").open("a") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*launch, *flags], stdout=log, stderr=log, env=env)


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def complete(out: Path) -> dict[str, str]:
    """The checkpoints that count, with what their checkpoint.json says, a hash of each file among it."""
    marks = (out / "checkpoints").glob("step-????????/checkpoint.json")
    return {mark.parent.name: mark.read_text() for mark in marks}


def steps_done(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.exists() else 0


def what_it_hit(out: Path, began_with: int) -> str:
    if list((out / "checkpoints").glob("*.partial")):
        return "while a checkpoint was written"
    if list((out / "checkpoints").glob("*.deleted")):
        return "while an old checkpoint was removed"
    return "in training" if steps_done(out) != began_with else "in start-up"


def disturb(args: Kills, out: Path) -> Counter[str]:
    chance, hits, lost = random.Random(args.seed), Counter(), []
    while hits.total() < args.kills:
        began_with = steps_done(out)
        run = start(args, out, "--resume", "auto")
        time.sleep(chance.uniform(1, args.longest))
        before, workers = complete(out), children(run.pid)
        if run.poll() is not None or not workers:
            raise SystemExit(f"the run was over after {hits.total()} kills: give --flags with more epochs")
        os.kill(chance.choice(workers), signal.SIGKILL)
        hits[what_it_hit(out, began_with)] += 1
        if chance.random() < 0.3:  # the rest with it, as when a machine goes down
            for pid in (run.pid, *workers):
                os.kill(pid, signal.SIGKILL)
        run.wait(300)
        while any(alive(pid) for pid in workers):
            time.sleep(0.05)
        after = complete(out)
        newest = max(before, default="")  # older ones make room for it
        if newest and max(after, default="") <= newest and after.get(newest) != before[newest]:
            lost.append(newest)
        print(f"kill {hits.total()}: {steps_done(out)} steps done, checkpoints {', '.join(sorted(after))}", flush=True)
    hits["complete checkpoints lost"] = len(lost)
    return hits


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def numbers(out: Path) -> list[dict[str, float]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


def state(out: Path) -> dict[str, torch.Tensor]:
    """What was exported, and the last checkpoint."""
    files = [*out.glob("adapter/*.safetensors"), *out.glob("model/*.safetensors")]
    newest = sorted((out / "checkpoints").glob("step-????????"))[-1]
    files += newest.rglob("*.safetensors")
    tensors = {f"{f.relative_to(out)} {name}": t for f in files for name, t in load_file(f).items()}
    if (newest / ".metadata").exists():
        dcp_to_torch_save(newest, out / "newest.pt")
        for part, members in torch.load(out / "newest.pt", weights_only=True).items():
            tensors |= {f"{newest.name} {part} {name}": tensor for name, tensor in members.items()}
    return tensors


def main(args: Kills) -> None:
    check_unused(args.folder)
    args.folder.mkdir(parents=True, exist_ok=True)
    whole, killed = args.folder / "whole", args.folder / "killed"
    assert start(args, whole).wait() == 0, f"see {whole}.log"
    hits = disturb(args, killed)
    assert start(args, killed, "--resume", "auto").wait() == 0, f"see {killed}.log"
    for hit, count in hits.items():
        print(f"{count:4} {hit}")
    one, other = state(whole), state(killed)
    differing = [name for name in one.keys() | other.keys() if name not in one or name not in other]
    differing += [name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])]
    lines = numbers(whole) == numbers(killed)
    print(f"{len(one)} tensors compared, {len(differing)} differ; metrics.jsonl {'equal' if lines else 'DIFFERS'}")
    sys.exit(bool(differing or not lines or hits["complete checkpoints lost"]))


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(filled(Kills)))
