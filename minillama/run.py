"""A training run: the flags that all recipes share, run.json, and what is said before it starts."""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass, replace
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from minillama.cache import open_packed, prepare, prepare_evaluation
from minillama.checkpoint import CheckpointConfig
from minillama.datasets import DataConfig, check_vocabulary, load_collator
from minillama.distributed import Device, FsdpConfig, all_reduce, on_each_node, on_rank_zero, rank, say, warn
from minillama.errors import UserError, disk_text
from minillama.files import lock, misfit, read_json, write_whole
from minillama.hf import weights_fingerprint
from minillama.hub import model_name
from minillama.kernels import KernelsConfig, choose_kernels
from minillama.metrics import LogConfig, plot_loss
from minillama.model import Llama, LlamaConfig
from minillama.optim import OptimConfig
from minillama.packing import Packed
from minillama.precision import choose_precision
from minillama.profiling import MFU_FORMULA, ProfileConfig, count_parameters
from minillama.resume import Checkpoint, find_checkpoint, has_checkpoint, saved_steps
from minillama.tokenizer import load_tokenizer
from minillama.train import EvalConfig, Progress, TrainConfig, count_steps

Config = TypeVar("Config")
C = TypeVar("C", bound="RunConfig")


@dataclass(frozen=True)
class RunConfig:
    """The flags of every training recipe."""

    model: Path
    """Folder of the base model, in Hugging Face's format or Meta's; or ORG/NAME of the Hugging Face hub."""
    output_dir: Path
    """Folder for what the run leaves; made if need be."""
    tokenizer: Path | None = None
    """Folder or file of the tokenizer; None: the model's folder."""
    resume: str = "none"
    """none; auto: go on from the newest sound checkpoint of OUTPUT_DIR, or start if there is none; or DIR, the folder of
    a checkpoint, or of a run whose newest it takes."""
    seed: int = 42
    """Decides what starts at random, the order of the data and the dropout."""
    device: Device = "auto"
    """auto: CUDA if there is one."""
    config: Path | None = None
    """The run.json of an earlier run: its flags are the defaults of this one."""
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


@dataclass(frozen=True)
class Start:
    """Where a run starts from."""

    progress: Progress
    checkpoint: Checkpoint | None
    """None: the base model"""
    fingerprints: dict[str, str]
    """Of the base model and of the training data: what a run that resumes must find again"""


def find_start(config: RunConfig) -> Checkpoint | None:
    """The checkpoint to resume from, read through and sound; None to start from the base model. Every rank must call it.

    Raises UserError for --resume DIR without a sound one.
    """
    resume = config.resume
    if _restarted(config.output_dir) and on_rank_zero(lambda: has_checkpoint(config.output_dir)):
        resume = "auto"
    return None if resume == "none" else find_checkpoint(resume, config.output_dir)


def _restarted(output_dir: Path) -> bool:
    """Whether torchrun --max-restarts started this process: the run goes on, whatever it started from."""
    # Only the node whose worker died counts up.
    [restarts] = all_reduce([float(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))], "max")
    return restarts > 0 and on_rank_zero(lambda: _is_of_this_launch(output_dir))


def resolve_precision(config: C, device: str, checkpoint: Checkpoint | None) -> tuple[C, str]:
    """config with --fsdp.precision auto resolved, as run.json and checkpoints remember it, and the precision in words."""
    saved = checkpoint.content["flags"]["fsdp"]["precision"] if checkpoint else None
    fsdp, precision = choose_precision(config.fsdp, device, saved=saved, cache_dir=config.data.cache_dir)
    return replace(config, fsdp=fsdp), precision


def resolve_kernels(
    config: RunConfig, model: Llama, fsdp: FsdpConfig, device: str, checkpoint: Checkpoint | None
) -> str:
    """Gives the model its attention, with auto that of a checkpoint from the same kind of device; says which and why.

    fsdp: with its precision resolved.
    """
    content = checkpoint.content if checkpoint else {}
    saved = content["attention"] if content.get("device") == device else None  # a CPU's is slow on a GPU
    return choose_kernels(model, config.kernels, fsdp.compute_dtype, device, config.data.cache_dir, saved)


def start_run(config: RunConfig, train: Packed, checkpoint: Checkpoint | None) -> Start:
    """Makes the output folder and writes run.json: the resolved flags and what they run on. Every rank must call it.

    Raises UserError if the folder cannot be written or holds a run that is not to be resumed, and for a checkpoint of a
    run that this one could not continue.
    """
    output_dir, resume = config.output_dir, config.resume
    restarted = _restarted(output_dir)
    fingerprints = {
        "model": on_rank_zero(lambda: weights_fingerprint(config.model)),
        "data": train.fingerprint,
    }
    efficiency = _efficiency(train, config.train.batch_size, dist.get_world_size(), config.train.accumulate)
    lines = []
    if checkpoint is None:
        progress = config.train.begin(dist.get_world_size())
    else:
        progress = checkpoint.progress
        lines = compare_flags(config, checkpoint, fingerprints)
    total = count_steps(train, config.train, progress.window)
    if checkpoint and total < progress.step:
        raise UserError(
            f"{checkpoint.folder} is after step {progress.step}, and this run would end after step {total}: raise "
            "--train.max-steps or --train.epochs, or resume from an earlier checkpoint"
        )
    config.profile.check_steps(total - progress.step)
    config.profile.make_folders()

    def write() -> None:
        run = {
            "id": uuid.uuid4().hex,
            "launch": _launch(),
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
        file = output_dir / "run.json"
        continues = restarted or _continues(output_dir, resume, checkpoint)
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            _claim(output_dir.resolve())
            if continues and file.exists():
                run["id"] = read_json(file).get("id", run["id"])
            write_whole(file, json.dumps(run, indent=2, default=str) + "\n")
        except OSError as error:
            raise UserError(disk_text(error, f"--output-dir {output_dir}", "cannot be written")) from None

    on_rank_zero(write)
    for line in lines:
        say(line)
    return Start(progress, checkpoint, fingerprints)


@cache
def _claim(folder: Path) -> None:
    """Locks the folder until this process ends. Raises UserError if another process has locked it."""
    try:
        lock(folder)
    except BlockingIOError:
        raise UserError(f"another run is writing to {folder}: wait for its end, or give another --output-dir") from None


def _launch() -> str:
    """Tells one call of torchrun from another."""
    return f"{socket.gethostname()} {os.getppid()} {os.environ.get('TORCHELASTIC_RUN_ID')}"


def _is_of_this_launch(output_dir: Path) -> bool:
    file = output_dir / "run.json"
    return file.exists() and read_json(file).get("launch") == _launch()


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


DECISIVE = ("seed", "optim.kind", "fsdp.precision", "train.freeze_layers", "lora.", "adapter.")
"""Flags, or groups of them, without which a run cannot go on as it began."""
HARMLESS = (
    "resume",
    "config",
    "output_dir",
    "lora.from_",
    "lora.merge",
    "adapter.from_",
    "data.workers",
    "data.cache_dir",
    "profile.",
)
"""Flags that a resumed run may well have otherwise, and not worth a word."""


def compare_flags(config: RunConfig, checkpoint: Checkpoint, fingerprints: dict[str, str]) -> list[str]:
    """What to tell of a run that resumes, with how its flags differ from those of the checkpoint.

    Raises UserError where it could not continue: other data, samples a step, seed, base model, adapter, precision.
    """
    saved, progress = checkpoint.content, checkpoint.progress
    before, now = _flat(saved["flags"]), _flat(json.loads(json.dumps(asdict(config), default=str)))
    changed = {
        name: f"--{name.replace('_', '-')} {now.get(name)} (was {before.get(name)})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(HARMLESS)
    }
    refused = [text for name, text in changed.items() if name.startswith(DECISIVE)]
    for what, flags in (("model", ("model",)), ("data", ("data.", "tokenizer"))):
        if fingerprints[what] != saved["fingerprints"][what]:
            named = [text for name, text in changed.items() if name.startswith(flags)]
            if named or "seed" not in changed:  # which decides what is held out, and how rows are packed
                refused += named or [f"{what} whose content is not what it was"]
    if refused:
        raise UserError(
            f"{checkpoint.folder} cannot be resumed with {', '.join(refused)}: give what it was made with, or start "
            "anew in another --output-dir"
        )
    ranks, train = dist.get_world_size(), config.train
    packs, packs_before = (f["train.batch_size"] * f["train.accumulate"] for f in (now, before))
    if packs * ranks != progress.window and packs != packs_before:
        fitting = progress.window / (train.batch_size * ranks)
        remedy = f"--train.accumulate {fitting:.0f}" if fitting.is_integer() else "what it was made with"
        raise UserError(
            f"--train.batch-size {train.batch_size} x --train.accumulate {train.accumulate} x {ranks} processes are "
            f"{packs * ranks} packs a step, and the steps of {checkpoint.folder} have {progress.window}: give {remedy}"
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


def saved_flags(config_class: type[Config]) -> Config | None:
    """The flags of the run.json that --config names on the command line, to be the defaults of this run; None without.

    Raises UserError if the file is not a run.json, or one of another recipe.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, nargs="?")  # without a value: the real parser says so
    file = parser.parse_known_args()[0].config
    if file is None:
        return None

    def flag(where: str, name: str) -> str:
        return (where + name).replace("_", "-")

    def build(kind: Any, values: dict[str, Any], where: str) -> Any:
        hints = get_type_hints(kind)
        if unknown := values.keys() - hints.keys():
            raise UserError(f"--config {file}: this recipe has no flag --{flag(where, sorted(unknown)[0])}")
        read = {}
        for name, value in values.items():
            hint = hints[name]
            allowed = get_args(hint) or (hint,)
            if is_dataclass(hint) and isinstance(value, dict):
                read[name] = build(hint, value, f"{name}.")
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
                raise UserError(f"--config {file}: {json.dumps(value)} is not a value of --{flag(where, name)}")
        return kind(**read)

    try:
        content = read_json(file)
    except UserError as error:
        raise UserError(f"--config {file} is not the run.json of a run: {error}") from None
    if problem := misfit(content, {"flags": {"model": str}}):
        raise UserError(f"--config {file} is not the run.json of a run: {problem}")
    hints, shared = get_type_hints(config_class).keys(), get_type_hints(RunConfig).keys()
    if others := (hints - shared) ^ (content["flags"].keys() - shared):
        raise UserError(f"--config {file} is of another recipe: only one of the two has the flags of {min(others)}")
    return build(config_class, content["flags"], "")


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def with_date(config: DataConfig, checkpoint: Checkpoint | None) -> DataConfig:
    """config with the day that chat templates are told: the one given, else that of the checkpoint, else today.

    Every rank must call it: for one of them it may be tomorrow already.
    """
    saved = checkpoint.content["flags"]["data"].get("date") if checkpoint else None
    return replace(config, date=config.date or saved or on_rank_zero(lambda: date.today().isoformat()))


def load_data(config: RunConfig, model: Llama) -> tuple[Any, Packed, Packed | None]:
    """The tokenizer, what to train on, and what to evaluate on. Raises UserError for what is wrong with the data."""
    tokenizer = load_tokenizer(config.tokenizer or config.model, day=config.data.day)
    check_vocabulary(tokenizer, model.config.vocab_size)
    collator = load_collator(config.data, tokenizer)
    processes = config.data.workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    folders = on_each_node(
        lambda: prepare(config.data, tokenizer, config.seed, validation=config.eval.enabled, processes=processes)
    )
    train, validation = (_open_everywhere(folder, collator) if folder else None for folder in folders)
    assert train
    say(f"data        {folders[0].parent}")
    return tokenizer, train, validation


def load_evaluation_data(data: DataConfig, tokenizer: Any, vocab_size: int, seed: int) -> Packed:
    """What to evaluate a model on that is there already; every rank must call it.

    Raises UserError for what is wrong with the data, and for a tokenizer that is not a model's of this vocabulary.
    """
    check_vocabulary(tokenizer, vocab_size)
    collator = load_collator(data, tokenizer)
    processes = data.workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return _open_everywhere(on_each_node(lambda: prepare_evaluation(data, tokenizer, seed, processes)), collator)


def _open_everywhere(folder: Path, collator: Callable[[Any], Any] | None) -> Packed:
    packed = replace(open_packed(folder), collator=collator)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, packed.fingerprint)
    if len(set(everywhere)) > 1:
        raise UserError("the machines have different data: give all of them the same files")
    return packed


def summary(
    config: RunConfig,
    fsdp: FsdpConfig,
    mesh: DeviceMesh,
    precision: str,
    attention: str,
    model: Llama,
    train: Packed,
    validation: Packed | None,
    window: int,
) -> str:
    """What a run is about to do, in a few lines. fsdp: config.fsdp with its strategy resolved; precision, attention: which,
    and why; window: packs a step."""
    total, trained = count_parameters(model)
    spread = fsdp.strategy + (f" of {mesh.size(1)}" if fsdp.strategy == "hybrid-shard" else "")
    if fsdp.strategy != config.fsdp.strategy:
        spread += f" (chosen by {config.fsdp.strategy})"
    lines = [
        f"model       {total:,} parameters, {trained:,} of them trained ({trained / total:.3%})",
        f"processes   {mesh.size()} on {mesh.device_type}, {spread}{', offloaded' if fsdp.cpu_offload else ''}, "
        f"recompute {fsdp.recompute}",
        f"precision   {precision}",
        f"attention   {attention}{'; blocks compiled' if config.kernels.compile else ''}",
    ]
    for name, packed in (("training", train), ("validation", validation)):
        batch, accumulate = config.eval.batch_size, 1
        if packed is train:
            batch, accumulate = config.train.batch_size, config.train.accumulate
        text = "none" if packed is None else described(packed, model.config, batch, mesh.size(), accumulate)
        lines.append(f"{name:11} {text}")
    optim = config.optim
    lines.append(
        f"steps       {count_steps(train, config.train, window)}, {optim.kind}, learning rate {optim.lr:g} "
        f"({optim.schedule}, {optim.warmup_steps} steps of warmup), weight decay {optim.weight_decay:g}"
    )
    lines.append(f"output      {config.output_dir}")
    lines.append(f"mfu         {MFU_FORMULA}")
    return "\n".join(lines)


def finish_run(config: RunConfig) -> None:
    """Draws loss.png, and says how to go on. What it cannot draw is no reason to fail: all is saved."""
    if rank() != 0:
        return
    output, trained = config.output_dir, "--model {0} --adapter {1}/adapter"
    try:
        if not plot_loss(output / "metrics.jsonl", output / "loss.png"):
            say(f"loss.png: not drawn without matplotlib: pip install matplotlib, tools/plot_metrics.py {output}")
    except UserError as error:
        warn(str(error))
    if not (output / "adapter").is_dir():
        trained = "--model {1}/model"
    asked = "" if config.data.dataset == "chat" else " --template none"
    say(f"next: python recipes/generate.py {trained.format(model_name(config.model), output)}{asked} --prompt TEXT")


def _efficiency(packed: Packed, batch_size: int, world_size: int, accumulate: int) -> float:
    if packed.batching == "padding":
        return packed.padded_efficiency(batch_size, world_size, accumulate)
    return packed.efficiency


def described(packed: Packed, config: LlamaConfig, batch_size: int, world_size: int, accumulate: int = 1) -> str:
    """How many rows, tokens and packs there are, and what was left out of them. config: the model's."""
    rows = "rows and pieces of rows" if packed.long["split"] else "rows"
    text = f"{len(packed.sizes):,} {rows}, {packed.tokens:,} tokens, "
    if packed.batching == "padding":
        text += f"batches of {batch_size} padded to the longest"
    else:
        text += f"{len(packed):,} packs of {packed.context_length}"
    text += f" ({_efficiency(packed, batch_size, world_size, accumulate):.1%} full)"
    for what in ("dropped", "truncated", "split"):
        if packed.long[what]:
            text += f"; {packed.long[what]:,} longer than {packed.context_length} {what.upper()}"
    if packed.long["untrained"]:
        text += f", of which {packed.long['untrained']:,} {rows} LEFT OUT, with nothing to train"
    if packed.documents.refused:
        text += f"; {packed.documents.refused:,} bad ones SKIPPED"
    if packed.documents.had_ends:
        text += f"; {packed.documents.had_ends:,} had BOS or EOS in their text, and were given no second one"
    if (longest := int(packed.sizes.max())) > (limit := config.max_position_embeddings):
        text += f"; the longest, {longest}, BEYOND the {limit} the model was made for"
    return text
