"""What tools/estimate.py would say of a step on CPUs, beside that step taken for real and counted.

    python tools/measure/estimate_check.py --model models/SmolLM2-135M-Instruct
    torchrun --nproc_per_node 4 tools/measure/estimate_check.py --model models/SmolLM2-135M-Instruct

Needs only the model's config.json: weights are random. Full fine-tuning, LoRA and llama-adapter, the last two on a plain
base and on one in NF4, each with another sharding and recomputation. Parameters, gradients and optimizer state of rank 0
must agree exactly, the peak of each phase within 5 %.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below: no traceback

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.errors import UserError
from minillama.formats.hf import read_config
from minillama.formats.quantized import Quantize, quantize_base
from minillama.help import filled
from minillama.model.attention import BACKENDS
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama
from minillama.parallel.failures import user_errors
from minillama.parallel.initialise import materialise
from minillama.parallel.processes import process_group, quiet_but_on_rank_zero, rank, say
from minillama.parallel.sharding import FsdpConfig, local, make_mesh, set_dtypes, shard
from minillama.training.alive import Alive
from minillama.training.estimate import batch_of_zeros, estimate
from minillama.training.optim import OptimConfig, make_optimizer
from minillama.training.step import train_step

CASES: tuple[tuple[str, Quantize, FsdpConfig, int], ...] = (  # the last: micro-batches
    ("full", "none", FsdpConfig(strategy="full-shard", precision="fp32"), 2),
    ("lora", "none", FsdpConfig(strategy="shard-grad-op", precision="mixed", recompute="selective"), 2),
    ("lora", "nf4", FsdpConfig(strategy="full-shard", precision="mixed", recompute="full"), 1),
    ("llama-adapter", "none", FsdpConfig(strategy="no-shard", precision="mixed", recompute="full"), 2),
    ("llama-adapter", "nf4", FsdpConfig(strategy="full-shard", precision="fp32"), 1),
)
WITHIN = 0.05
Found = tuple[dict[str, int], dict[str, int]]
"""Bytes that rank 0 holds between backward and optimizer, and the peak of each phase"""


@dataclass(frozen=True)
class Args:
    """Estimates beside steps that are taken."""

    model: Path
    """Folder with the config.json of a model."""
    methods: tuple[Literal["full", "lora", "llama-adapter"], ...] = ("full", "lora", "llama-adapter")
    """Which to try."""
    rows: int = 2
    """Of a micro-batch."""
    context_length: int = 256
    """Tokens of a row."""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.context_length < 2:
            raise UserError("--rows must be at least 1, and --context-length at least 2")

    @property
    def cases(self) -> list[tuple[str, Quantize, FsdpConfig, int]]:
        return [case for case in CASES if case[0] in self.methods]


def build(config: LlamaConfig, method: str, quantize: Quantize) -> Llama:
    with torch.device("meta"):
        model = Llama(config)
    if method == "full":
        return model
    quantize_base(model.requires_grad_(False), {}, quantize)
    if method == "lora":
        return apply_lora(model, LoraConfig())
    return apply_llama_adapter(model, LlamaAdapterConfig(layers=min(3, config.num_hidden_layers)))


def estimated(args: Args, world_size: int) -> list[Found]:
    config = read_config(args.model)
    found = []
    for method, quantize, fsdp, accumulate in args.cases:
        step = estimate(
            lambda method=method, quantize=quantize: build(config, method, quantize),  # type: ignore[misc]
            world_size,
            fsdp=fsdp,
            optim=OptimConfig(),
            batch_size=args.rows,
            context_length=args.context_length,
            accumulate=accumulate,
            device="cpu",
            attention="math",
        )
        assert not step.reads, "the step waits for a value"
        found.append((step.state, {phase: peak.size for phase, peak in step.peaks.items()}))
    return found


def size(tensors) -> int:
    return sum(local(t).numel() * t.element_size() for t in tensors)


def real(args: Args, method: str, quantize: Quantize, fsdp: FsdpConfig, accumulate: int) -> Found:
    model = build(read_config(args.model), method, quantize)
    model.attention = BACKENDS["math"]
    set_dtypes(model, fsdp)
    shard(model, make_mesh(fsdp, "cpu"), fsdp)
    batches = [batch_of_zeros(args.rows, args.context_length) for _ in range(accumulate)]
    for batch in batches:
        assert len(batch.lengths) == args.rows and batch.targets.rows.numel() == batch.trained  # both are made here
    alive = Alive()
    state = {}
    with alive if rank() == 0 else nullcontext():
        materialise(model, "cpu")
        alive.hold([*model.parameters(), *model.buffers()], "parameters")
        for tensor in (*model.parameters(), *model.buffers()):
            torch.nn.init.normal_(local(tensor.detach()), std=0.1)  # any bytes are NF4 codes
        optimizer = make_optimizer(model.parameters(), OptimConfig())
        states = [tensor for own in optimizer.state.values() for tensor in own.values()]
        alive.hold(states, "optimizer")
        alive.watch(model, optimizer)

        def note(*_) -> None:
            state["parameters"] = size(model.parameters())
            state["gradients"] = size(p.grad for p in model.parameters() if p.grad is not None)
            state["optimizer"] = size(states)

        optimizer.register_step_pre_hook(note)
        for batch in batches:
            alive.hold([batch.tokens, batch.positions, batch.targets.rows, batch.targets.ids], "activations")
        model.train()
        loss, _ = train_step(model, optimizer, batches)
    assert loss.isfinite()
    return state, {phase: peak.size for phase, peak in alive.peaks().items()}


def main(args: Args) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    guesses = estimated(args, world_size) if os.environ.get("RANK", "0") == "0" else []  # before there are processes
    off = []
    with process_group("cpu"):
        say(f"{world_size} processes, {args.rows} x {args.context_length} tokens; MiB, estimated / counted")
        for number, (method, quantize, fsdp, accumulate) in enumerate(args.cases):
            state, peaks = real(args, method, quantize, fsdp, accumulate)
            if not guesses:
                continue
            cells = []
            for guess, found, within in zip(guesses[number], (state, peaks), (0.0, WITHIN), strict=True):
                for name, counted in found.items():
                    cells.append(f"{name} {guess[name] / 2**20:.2f} / {counted / 2**20:.2f}")
                    if abs(guess[name] - counted) > within * counted:
                        off.append(f"{method}, {quantize}: {name}")
            say(f"{method}, {quantize}, {fsdp.strategy}, recompute {fsdp.recompute}: {', '.join(cells)}")
    if off:
        raise UserError(f"estimates that are off: {'; '.join(off)}")


if __name__ == "__main__":
    with user_errors():
        with quiet_but_on_rank_zero():
            args = tyro.cli(filled(Args))
        main(args)
