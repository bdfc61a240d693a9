"""How the flags of a run that resumes differ from those its checkpoint was made with."""

import json
from dataclasses import asdict, fields
from typing import Any

import torch.distributed as dist

from minillama.errors import UserError
from minillama.training.config import RunConfig
from minillama.training.resume import Checkpoint

MUST_MATCH = ("seed", "optim.kind", "fsdp.precision", "train.freeze_layers", "method", "lora.", "adapter.", "dpo.")
"""Flags, or groups of flags, that a resumed run must not change."""
IGNORED = (
    "resume",
    "config",
    "output_dir",
    "lora.from_",
    "lora.merge",
    "adapter.from_",
    "dpo.precompute",
    "data.workers",
    "data.cache_dir",
    "profile.",
)
"""Flags that a resumed run may change without a message."""


def compare_flags(config: RunConfig, checkpoint: Checkpoint, fingerprints: dict[str, str]) -> list[str]:
    """What to print about a run that resumes: how its flags differ from those of the checkpoint.

    Raises UserError if it cannot continue: other data, samples a step, seed, base model, adapter, precision.
    """
    saved, progress = checkpoint.content, checkpoint.progress
    shared = {field.name for field in fields(RunConfig)}
    if others := (saved["flags"].keys() ^ {field.name for field in fields(config)}) - shared:
        raise UserError(
            f"{checkpoint.folder} is of another recipe, only one of the two has the flags of {min(others)}: resume it by "
            "that recipe, or give this one another --output-dir"
        )
    before, now = _flat(saved["flags"]), _flat(json.loads(json.dumps(asdict(config), default=str)))
    changed = {
        name: f"--{name.replace('_', '-')} {now.get(name)} (was {before.get(name)})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(IGNORED)
    }
    refused = [text for name, text in changed.items() if name.startswith(MUST_MATCH)]
    for what, flags in (("model", ("model",)), ("data", ("data.", "tokenizer"))):
        if fingerprints[what] != saved["fingerprints"][what]:
            named = [text for name, text in changed.items() if name.startswith(flags)]
            if named or "seed" not in changed:  # the seed decides what is held out and how rows are packed
                refused += named or [f"{what} whose content is not what it was"]
    if refused:
        raise UserError(
            f"{checkpoint.folder} cannot be resumed with {', '.join(refused)}: give what it was made with, or start "
            "from scratch in another --output-dir"
        )
    ranks, train = dist.get_world_size(), config.train
    packs, packs_before = (f["train.batch_size"] * f["train.accumulate"] for f in (now, before))
    if packs * ranks != progress.packs_per_step and packs != packs_before:
        fitting = progress.packs_per_step / (train.batch_size * ranks)
        remedy = f"--train.accumulate {fitting:.0f}" if fitting.is_integer() else "what it was made with"
        raise UserError(
            f"--train.batch-size {train.batch_size} x --train.accumulate {train.accumulate} x {ranks} processes are "
            f"{packs * ranks} packs a step, and the steps of {checkpoint.folder} have {progress.packs_per_step}: "
            f"give {remedy}"
        )
    lines = [f"resumed     {checkpoint.folder}, after step {progress.step}"]
    if ranks != saved["world_size"]:
        lines[0] += f"; on {ranks} instead of {saved['world_size']} processes, with the same samples in each step"
    if changed:
        lines.append(f"changed     {', '.join(changed.values())}")
    return lines


def _flat(flags: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in flags.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
