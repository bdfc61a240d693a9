"""Whole runs: checkpoints and resuming, every strategy on one process and on all, what a step waits for, a recipe."""

import base64
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from checks import Check, Context, NotRun, distance, worst
from model_parts import KINDS, adapted, answering, batches_of, build, documents, filled, prompts_of
from torch import Tensor

from minillama.data.batch import collate
from minillama.errors import UserError
from minillama.hardware.kernels import KernelsConfig, choose_kernels
from minillama.inference.generate import generate
from minillama.model.llama import Llama
from minillama.parallel.initialise import materialise
from minillama.parallel.sharding import FsdpConfig, local, make_mesh, set_dtypes
from minillama.training.checkpoint import CheckpointConfig
from minillama.training.config import RunConfig
from minillama.training.flops import FlopCounter, step_flops
from minillama.training.loop import training_loop
from minillama.training.metrics import Metrics
from minillama.training.optim import OptimConfig, make_optimizer
from minillama.training.out_of_memory import out_of_memory_explained
from minillama.training.plan import Progress, TrainConfig, steps
from minillama.training.profiling import ProfileConfig
from minillama.training.resume import find_checkpoint
from minillama.training.run import Run
from minillama.training.step import batch_loss, train_step

ROOT = Path(__file__).parents[2]
EVERY_TWO, NO_PROFILE = CheckpointConfig(every=2), ProfileConfig()
WINDOW = 8
"""Packs a step, however many processes share them"""
STRATEGIES = {
    "full-shard": FsdpConfig(strategy="full-shard"),
    "shard-grad-op": FsdpConfig(strategy="shard-grad-op"),
    "no-shard": FsdpConfig(strategy="no-shard"),
    "hybrid-shard": FsdpConfig(strategy="hybrid-shard"),
    "auto": FsdpConfig(),
    "full-shard, cpu-offload": FsdpConfig(strategy="full-shard", cpu_offload=True),
    "no-shard, cpu-offload": FsdpConfig(strategy="no-shard", cpu_offload=True),
    "full-shard, recompute full": FsdpConfig(strategy="full-shard", recompute="full"),
}


def run_checks(context: Context) -> list[Check]:
    """Those of one process."""
    needs_cuda = "" if context.cuda else "it is of CUDA"
    found = [
        Check(
            "checkpoint",
            f"{how}: the state after resuming, bit for bit",
            lambda how=how: state_error(context, how),
            0.0,
        )
        for how in ("sharded, async", "full, at once")
    ]
    found.append(
        Check(
            "checkpoint",
            "math: 4 steps, 2 of them after resuming, bit for bit",
            lambda: resume_error(context, "math", "fp32"),
            0.0,
        )
    )
    found.append(
        Check(
            "checkpoint",
            "the kernel that auto takes: 4 steps, 2 of them after resuming",
            lambda: resume_error(context, "auto", "mixed"),
            skip=needs_cuda or context.no_half(torch.bfloat16),
        )
    )
    found.append(Check("profile", "memory snapshot and trace are written", lambda: profile_error(context), 0.0))
    found.append(
        Check(
            "profile",
            "attention counted over 14/6 of the formula's",
            lambda: flops_error(context),
            1e-3,
            "FlexAttention, which is compiled, is not counted" if context.no_half(torch.bfloat16) else "",
        )
    )
    found.append(
        Check("memory", "running out is explained", lambda: out_of_memory_error(context), 0.0, skip=needs_cuda)
    )
    for strategy in ("full-shard", "no-shard"):
        found.append(
            Check(
                "sync",
                f"places where a step waits for the device, {strategy}",
                lambda strategy=strategy: waits(context, strategy),
                skip=needs_cuda,
            )
        )
    found += strategy_checks(context)
    found.append(Check("recipe", "recipes/lora_fsdp.py, resumed and merged", lambda: recipe_error(context), 0.0))
    return found


def strategy_checks(context: Context) -> list[Check]:
    """Losses and gradient norms of 4 steps against a plain model on one process; those of several processes too."""
    where = "1 process" if context.processes == 1 else f"{context.processes} processes"
    found = []
    # On one process of a CPU nothing is sharded, and no other code runs.
    for strategy in STRATEGIES if context.cuda or context.processes > 1 else ("full-shard",):
        for kind in KINDS if strategy == "full-shard" else ("full", "lora"):
            found.append(
                Check(
                    "strategies",
                    f"{where}, {strategy}, {kind}",
                    lambda strategy=strategy, kind=kind: strategy_error(context, strategy, kind),
                    5e-4,
                )
            )
    if context.processes > 1:
        found.append(
            Check("strategies", f"{where}, generation as on one", lambda: shared_generation_error(context), 0.0)
        )
    return found


# --- checkpoints


@dataclass
class Trained:
    losses: list[float]
    state: dict[str, Tensor]
    """Parameters, moments and so on, on the CPU"""


def state_of(model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = local(parameter.detach()).cpu().clone()
            found |= {f"{name} {key}": local(value).cpu().clone() for key, value in optimizer.state[parameter].items()}
    return found


def train(
    context: Context,
    folder: Path,
    *,
    until: int,
    total: int = 4,
    attention: str = "math",
    precision: str = "fp32",
    checkpoint: CheckpointConfig = EVERY_TWO,
    profile: ProfileConfig = NO_PROFILE,
) -> Trained:
    """A run of LoRA with dropout in the folder, from its newest checkpoint on; it stops after `until` of `total` steps.

    What recipes/lora_fsdp.py does, but for reading a model and data.
    """
    context.join()
    folder.mkdir(parents=True, exist_ok=True)
    packed = documents(context, 2 * total)
    fsdp = FsdpConfig(precision=precision, strategy="full-shard")  # type: ignore[arg-type]
    settings = TrainConfig(epochs=1, max_steps=total, batch_size=2)
    config = RunConfig(
        Path("none"),
        folder,
        train=settings,
        optim=OptimConfig(lr=3e-3, schedule="constant"),
        fsdp=fsdp,
        checkpoint=checkpoint,
        profile=profile,
    )
    found = find_checkpoint("auto", folder)
    run = Run(
        context.device,
        fsdp,
        make_mesh(fsdp, context.device),
        SimpleNamespace(pad_id=0),
        train=packed,
        validation=None,
        progress=found.progress if found else settings.begin(dist.get_world_size()),
        checkpoint=found,
        fingerprints={"model": "", "data": ""},
    )
    torch.manual_seed(1)
    model = build(context, "lora", fsdp, attention=attention, dropout=0.1).train()
    optimizer = make_optimizer(model.parameters(), config.optim)
    losses = []
    with training_loop(config, run, model, optimizer) as loop:
        at_start = state_of(model, optimizer)
        for step, batches in loop.steps():
            if step.number == until:
                break
            with loop.profiler.step(batches):
                loss, norm = train_step(model, optimizer, batches, clip_norm=1.0)
            loop.after(step, loss, norm, batches)
            losses.append(loss.item())
    return Trained(losses, state_of(model, optimizer) if losses else at_start)


def fresh(context: Context, name: str) -> Path:
    shutil.rmtree(context.folder / name, ignore_errors=True)
    return context.folder / name


def unequal(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, str]:
    different = [name for name in ours if not torch.equal(ours[name], exact[name])]
    if ours.keys() != exact.keys() or not ours:
        raise AssertionError("not the same tensors")
    return float(len(different)), f"of {len(ours)} tensors differ {', '.join(different[:2])}".strip()


def state_error(context: Context, how: str) -> tuple[float, str]:
    layout, when = how.split(", ")
    settings = CheckpointConfig(every=2, format=layout, async_save=when == "async")  # type: ignore[arg-type]
    folder = fresh(context, "state")
    saved = train(context, folder, until=2, checkpoint=settings)
    return unequal(train(context, folder, until=2, checkpoint=settings).state, saved.state)


def resume_error(context: Context, attention: str, precision: str) -> tuple[float, str]:
    """How many tensors differ after 4 steps; dropout draws the same numbers only if the generators go on too."""
    runs = {}
    for name, stops in {"whole": (4,), "resumed": (2, 4), "again": (4,)}.items():
        folder = fresh(context, name)
        for until in stops:
            runs[name] = train(context, folder, until=until, attention=attention, precision=precision)
    count, detail = unequal(runs["resumed"].state, runs["whole"].state)
    again, _ = unequal(runs["again"].state, runs["whole"].state)
    apart = max(distance(runs["resumed"].state[name], value) for name, value in runs["whole"].state.items())
    return count, f"{detail}, by {apart:.1e} at most; a second run from the start differs in {again:.0f}"


def profile_error(context: Context) -> tuple[float, str]:
    """How many of the files are missing or empty."""
    folder = fresh(context, "profile")
    snapshot = folder / "snapshot.pickle" if context.cuda else None
    profile = ProfileConfig(trace_dir=folder / "trace", memory_snapshot=snapshot)
    profile.make_folders()
    train(context, folder / "run", until=6, total=6, profile=profile, attention="auto")
    files = [folder / "trace" / "rank0.pt.trace.json.gz", *([snapshot] if snapshot else [])]
    missing = [file.name for file in files if not (file.exists() and file.stat().st_size > 1000)]
    detail = (
        f"without {', '.join(missing)}" if missing else "" if context.cuda else "a trace alone: snapshots are of CUDA"
    )
    return float(len(missing)), detail


def flops_error(context: Context) -> tuple[float, str]:
    """What FlopCounter counts, with the kernel that auto takes: causal attention as whole squares, scores twice."""
    precision = "mixed" if context.cuda else "fp32"
    model = build(context, "full", FsdpConfig(precision=precision))  # type: ignore[arg-type]
    [batch] = batches_of(documents(context, 2, whole=True), context.device, 1)  # no padding, which is counted too
    with FlopCounter() as counter:
        batch_loss(model, batch).backward()
    ratio = counter.in_attention / (step_flops(model, 0, 0, batch.squares) * 14 / 6)
    return abs(ratio - 1), f"the ratio is {ratio:.3f}, in {precision}"


def out_of_memory_error(context: Context) -> tuple[float, str]:
    """Whether the message names what is held."""
    fsdp = FsdpConfig(precision="fp32", strategy="full-shard")
    model = build(context, "full", fsdp)
    optimizer = make_optimizer(model.parameters(), OptimConfig())
    config = RunConfig(Path("none"), fresh(context, "memory"), fsdp=fsdp)
    config.output_dir.mkdir()
    metrics = Metrics(
        config.output_dir, config.log, model, context.device, torch.float32, 1, Progress(packs_per_step=1)
    )
    try:
        with out_of_memory_explained(config, fsdp, model, optimizer, metrics):
            torch.empty(2**50, device=context.device)
    except UserError as message:
        wanted = ("out of memory", "rank 0 holds", "parameters", "optimizer state", "What would help")
        missing = [part for part in wanted if part not in str(message)]
        return float(len(missing)), str(message)
    raise AssertionError("2^50 numbers fit")


def waits(context: Context, strategy: str) -> tuple[float, str]:
    """How often CUDA's debug mode warns in a step of LoRA under FSDP2, and where."""
    precision = "fp32" if context.no_half(torch.bfloat16) else "mixed"
    model = build(context, "lora", FsdpConfig(precision=precision, strategy=strategy))  # type: ignore[arg-type]
    optimizer = make_optimizer(model.parameters(), OptimConfig())
    batches = batches_of(documents(context, 6), context.device, 1)
    for _ in range(2):  # what is made once is made
        train_step(model, optimizer, batches, clip_norm=1.0)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train_step(model, optimizer, batches, clip_norm=1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = Counter(
        f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)
    )
    return float(found.total()), ", ".join(f"{place} ({count})" for place, count in found.most_common())


# --- strategies


def strategy_error(context: Context, strategy: str, kind: str) -> tuple[float, str]:
    reference = context.folder / f"plain-{kind}.json"
    if context.processes == 1 and not reference.exists():
        reference.write_text(json.dumps(numbers_of(context, kind, None)))
    if not reference.exists():
        raise NotRun("the run on one process failed")
    plain = json.loads(reference.read_text())
    if not plain["losses"][-1] < plain["losses"][0] - 0.02:
        raise AssertionError(f"the plain model learns nothing: {plain['losses']}")
    fsdp = replace(STRATEGIES[strategy], precision="fp32")
    if fsdp.strategy == "hybrid-shard":
        fsdp = replace(
            fsdp, shard_size=max(1, context.processes // 2) if context.processes % 2 == 0 else context.processes
        )
    ours = numbers_of(context, kind, fsdp)
    return worst(
        {
            name: max(abs(a / b - 1) for a, b in zip(ours[name], plain[name], strict=True))
            for name in ("losses", "norms")
        }
    )


def numbers_of(context: Context, kind: str, fsdp: FsdpConfig | None) -> dict[str, list[float]]:
    """Losses and gradient norms of 4 steps; fsdp None: on a plain model."""
    context.join()
    if fsdp:
        model = build(context, kind, fsdp, attention="math")
    else:
        model = adapted(context, kind)
        set_dtypes(model, FsdpConfig(precision="fp32"))
        choose_kernels(model, KernelsConfig("math"), torch.float32, context.device)
        materialise(model, context.device)
        filled(model)
    optimizer = make_optimizer(model.parameters(), OptimConfig(lr=KINDS[kind]))
    ranks, own, count = dist.get_world_size(), dist.get_rank(), 4
    packed = documents(context, WINDOW - 2)  # fewer than a step takes: some processes have less to do, or nothing
    config = TrainConfig(epochs=count, max_steps=count, batch_size=2, accumulate=1)
    start = Progress(packs_per_step=WINDOW)
    found: dict[str, list[float]] = {"losses": [], "norms": []}
    for step in steps(packed, config, 0, own, ranks, start):
        batches = [collate(packed, packs, 0, context.device) for packs in step.micro_batches]
        loss, norm = train_step(model.train(), optimizer, batches, clip_norm=1.0)
        found["losses"].append(loss.item())
        found["norms"].append(norm.item())
    return found


def shared_generation_error(context: Context) -> tuple[float, str]:
    """How many answers of a model sharded over all processes differ from those of the whole model on each process."""
    spread = answering(context, "fp32")
    whole = adapted(context, "full").requires_grad_(False)
    set_dtypes(whole, FsdpConfig(precision="fp32"))
    materialise(whole, context.device)
    filled(whole).eval()
    pairs = [
        [generate(model, prompt, max_new_tokens=24) for model in (spread, whole)] for prompt in prompts_of(context)
    ]
    return float(sum(a != b for a, b in pairs)), f"of {len(pairs)} answers differ"


# --- a recipe


def recipe_error(context: Context) -> tuple[float, str]:
    """How many of the files that a run of 4 steps, stopped after 2, should leave are missing."""
    if missing := [name for name in ("tyro", "tiktoken") if importlib.util.find_spec(name) is None]:
        raise NotRun(f"{' and '.join(missing)} not installed")
    from safetensors.torch import save_file

    base, out = fresh(context, "base"), fresh(context, "out")
    base.mkdir(parents=True)
    shape = replace(context.model, vocab_size=512)  # 256 bytes and 256 special tokens
    with torch.device("meta"):
        model = Llama(shape)
    materialise(model, "cpu")
    tensors = {name: parameter.detach().clone() for name, parameter in filled(model).named_parameters()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    described = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | asdict(shape)
    (base / "config.json").write_text(json.dumps(described))
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    (base / "tokenizer.model").write_text("\n".join(lines) + "\n")
    command = [sys.executable, str(ROOT / "recipes" / "lora_fsdp.py"), "--model", str(base), "--output-dir", str(out)]
    command += ["--device", context.device, "--resume", "auto", "--eval.max-steps", "2", "--train.batch-size", "2"]
    command += ["--data.cache-dir", str(context.folder / "cache"), "--data.context-length", "512", "--lora.merge"]
    command += ["--checkpoint.every", "2", "--fsdp.recompute", "selective"]
    env: dict[str, Any] = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for count in (2, 4):
        shutil.rmtree(out / "adapter", ignore_errors=True)
        shutil.rmtree(out / "model", ignore_errors=True)
        done = subprocess.run([*command, "--train.max-steps", str(count)], capture_output=True, text=True, env=env)
        if done.returncode:
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            raise AssertionError(f"ended with code {done.returncode}: {said[-1] if said else ''}")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    made = sum("grad_norm" in line for line in lines)
    wanted = ["adapter/adapter_model.safetensors", "model/config.json", "checkpoints/step-00000004/checkpoint.json"]
    lacking = [name for name in wanted if not (out / name).exists()]
    return float(len(lacking) + abs(made - 4)), f"{made} steps{', without ' + ', '.join(lacking) if lacking else ''}"
