"""The flags that all training recipes share, and run.json as their defaults."""

import argparse
import json
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch

from minillama.data.datasets import DataConfig
from minillama.errors import UserError
from minillama.files import misfit, read_json
from minillama.hardware.kernels import KernelsConfig
from minillama.parallel.processes import Device
from minillama.parallel.sharding import FsdpConfig
from minillama.training.checkpoint import CheckpointConfig
from minillama.training.metrics import LogConfig
from minillama.training.optim import OptimConfig
from minillama.training.plan import EvalConfig, TrainConfig
from minillama.training.profiling import ProfileConfig

Config = TypeVar("Config")


@dataclass(frozen=True)
class RunConfig:
    """The flags of every training recipe."""

    model: Path
    """Folder of the base model, in Hugging Face's format or Meta's; or ORG/NAME of the Hugging Face hub."""
    output_dir: Path
    """Folder for what the run leaves; it is created if needed."""
    tokenizer: Path | None = None
    """Folder or file of the tokenizer; None: the model's folder."""
    resume: str = "none"
    """none; auto: go on from the newest sound checkpoint of OUTPUT_DIR, or start if there is none; or DIR, the folder of
    a checkpoint, or of a run, of which the newest checkpoint is taken."""
    seed: int = 42
    """Decides random initial values, the order of the data, and dropout."""
    device: Device = "auto"
    """auto: CUDA if there is one."""
    config: Path | None = None
    """The run.json of an earlier run: its flags are the defaults of this one."""
    estimate: int = 0
    """Only say what a run on this many processes would need, a GPU each unless --device cpu: memory by kind and phase, what
    is sent, and the least time of a step. No GPU, weights or data are needed, only the model's config. 0: run."""
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    optim: OptimConfig = OptimConfig()
    fsdp: FsdpConfig = FsdpConfig()
    kernels: KernelsConfig = KernelsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig = ProfileConfig()

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.estimate < 0:
            raise UserError(f"--estimate {self.estimate}: must be at least 1, or 0 to run")
        if self.fsdp.precision == "fp16" and self.optim.kind == "anyprecision":
            raise UserError(
                "--fsdp.precision fp16 with --optim.kind anyprecision is not supported: give --optim.kind adamw, or "
                "--fsdp.precision mixed or bf16"
            )
        if self.checkpoint.best and not self.eval.enabled:
            raise UserError("--checkpoint.best needs the validation loss: give --eval.enabled")
        if self.profile.memory_snapshot and (self.device == "cpu" or not torch.cuda.is_available()):
            raise UserError("--profile.memory-snapshot is of CUDA's memory: leave it out on a CPU")
        if self.train.max_steps:
            self.profile.check_steps(self.train.max_steps)


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: must be at least 0 and below 2^32")


def saved_flags(config_class: type[Config]) -> Config | None:
    """The flags of the run.json that --config names on the command line, as defaults of this run; None without --config.

    Raises UserError if the file is not a run.json, or one of another recipe.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, nargs="?")  # without a value: the real parser says so
    file = parser.parse_known_args()[0].config
    if file is None:
        return None

    try:
        content = read_json(file)
    except UserError as error:
        raise UserError(f"--config {file} is not the run.json of a run: {error}") from None
    if problem := misfit(content, {"flags": {"model": str}}):
        raise UserError(f"--config {file} is not the run.json of a run: {problem}")
    hints, shared = get_type_hints(config_class).keys(), get_type_hints(RunConfig).keys()
    if others := (hints - shared) ^ (content["flags"].keys() - shared):
        raise UserError(f"--config {file} is of another recipe: only one of the two has the flags of {min(others)}")
    return from_flags(config_class, content["flags"], f"--config {file}")


def from_flags(kind: type[Config], values: dict[str, Any], source: str, where: str = "") -> Config:
    """A group of flags from what run.json holds of it. source: names the file in messages; where: the group's prefix.

    Raises UserError for a flag that there is not, and for a value that is none of its.
    """

    def flag(name: str) -> str:
        return (where + name).replace("_", "-")

    hints = get_type_hints(kind)
    if unknown := values.keys() - hints.keys():
        raise UserError(f"{source}: this recipe has no flag --{flag(sorted(unknown)[0])}")
    read: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        allowed = get_args(hint) or (hint,)
        if is_dataclass(hint) and isinstance(value, dict):
            read[name] = from_flags(hint, value, source, f"{name}.")  # type: ignore[arg-type]
        elif value is None and type(None) in allowed:
            read[name] = None
        elif Path in allowed and isinstance(value, str):
            read[name] = Path(value)
        elif get_origin(hint) is tuple and isinstance(value, list) and all(isinstance(v, str) for v in value):
            read[name] = tuple(value)
        elif get_origin(hint) is dict and misfit(value, {...: allowed[1]}) is None:
            read[name] = dict(value)
        elif get_origin(hint) not in (dict, tuple) and (
            value in allowed or type(value) in allowed or (float in allowed and type(value) is int)
        ):
            read[name] = value
        else:
            raise UserError(f"{source}: {json.dumps(value)} is not a value of --{flag(name)}")
    return kind(**read)
