"""What a step of any number of processes needs, memory, links and time, without a GPU and without weights.

The step is the one that trains, on tensors that have shapes and no memory: of rank 0, whose parts are the largest.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minillama.data.batch import Batch
from minillama.errors import UserError
from minillama.formats.hub import find_model
from minillama.hardware.precision import choose_precision
from minillama.model.attention import BACKENDS
from minillama.model.device import estimated_on
from minillama.model.llama import Llama, RMSNorm
from minillama.model.loss import IGNORE, Targets
from minillama.parallel.initialise import materialise
from minillama.parallel.sharding import FsdpConfig, choose_strategy, local, make_mesh, set_dtypes, shard
from minillama.training.alive import Alive, Peak, Work, fake_processes
from minillama.training.config import RunConfig
from minillama.training.flops import step_flops
from minillama.training.optim import LossScaler, OptimConfig, make_optimizer
from minillama.training.step import train_step

C = TypeVar("C", bound=RunConfig)
GIB = 2**30
HOST = ("parameters", "gradients", "optimizer")
"""The kinds that --fsdp.cpu-offload keeps in host memory"""


@dataclass(frozen=True)
class Card:
    """What a maker says of a GPU: dense bf16, without sparsity."""

    memory: float
    """GiB that nvidia-smi shows"""
    tflops: float
    """1e12 FLOP/s of bf16 matrix products"""
    bandwidth: float
    """GB/s of its memory"""
    link: float
    """GB/s that it sends to others of its machine, and receives at the same time: NVLink, else PCIe"""


CARDS = {
    "rtx4090-24": Card(23.99, 165, 1008, 32),
    "a10-24": Card(22.49, 125, 600, 32),
    "a100-40": Card(40.0, 312, 1555, 300),
    "l40s-48": Card(44.99, 362, 864, 32),
    "a100-80": Card(80.0, 312, 2039, 300),
    "h100-80": Card(79.65, 989, 3350, 450),
    "gh200-96": Card(95.58, 989, 4000, 450),
    "h200-141": Card(140.4, 989, 4800, 450),
    "b200-192": Card(179.06, 2250, 8000, 900),
}
NETWORK, PCIE, HOST_BANDWIDTH = 50.0, 32.0, 300.0
"""GB/s, of one GPU each: between machines (400 Gbit/s), to the host; and of the memory of a whole machine."""
CONTEXT, NCCL, FRAGMENTS = 0.6, 0.9, 0.05
"""Not part of an estimate, but allowed for where one is compared with a card: GiB of CUDA's context and kernels, GiB of
NCCL's buffers with several processes, and what the caching allocator loses between pieces, of all that is held."""


@dataclass(frozen=True)
class Estimate:
    """Of one step, on rank 0. Sizes in bytes."""

    world_size: int
    machine: int
    """Processes of one"""
    fsdp: FsdpConfig
    """Its strategy and precision resolved"""
    peaks: dict[str, Peak]
    """Device memory of the phases load, forward, backward, end of backward, optimizer, save"""
    state: dict[str, int]
    """parameters, gradients and optimizer of this rank, wherever they are"""
    host: int
    """In host memory while a checkpoint is written: what is offloaded, and the copy that is written from"""
    checkpoint: int
    """On disk, of all ranks"""
    tokens: int
    """A step trains on, of all ranks"""
    needed: float
    """FLOPs of this rank by the formula of mfu"""
    work: Work
    reads: int
    """How often the step waits for a number from the device"""

    @property
    def peak(self) -> int:
        return max(peak.size for peak in self.peaks.values())

    def allowed_for(self) -> float:
        """Bytes of a card that the step needs with what is not part of the estimate: see CONTEXT, NCCL, FRAGMENTS."""
        return self.peak * (1 + FRAGMENTS) + (CONTEXT + NCCL * (self.world_size > 1)) * GIB

    def seconds(self, card: Card, network: float = NETWORK) -> tuple[float, float]:
        """The least a step takes: with all that is sent behind what is computed, and with nothing behind it.

        Every product at the card's rate, every other operation at its memory's, every link full.
        """
        computed = self.work.flops / (card.tflops * 1e12) + self.work.moved / (card.bandwidth * 1e9)
        rates = {"inside": card.link, "between": network}
        sent = sum(size / (rates[link] * 1e9) for (_, link), size in self.work.sent.items())
        if self.fsdp.cpu_offload:  # shards go to the device twice, gradients come back; AdamW reads and writes it all
            sent += (2 * self.state["parameters"] + self.state["gradients"]) / (PCIE * 1e9)
            share = HOST_BANDWIDTH / min(self.machine, self.world_size)
            computed += 2 * sum(self.state.values()) / (share * 1e9)
        return max(computed, sent), computed + sent

    def __str__(self) -> str:
        def gib(size: float) -> str:
            return f"{size / GIB:.2f}" if size >= GIB / 10 or not size else f"{size / GIB:.2g}"

        highest = max(self.peaks, key=lambda phase: self.peaks[phase].size)
        kinds = sorted(self.peaks[highest].kinds.items(), key=lambda item: -item[1])
        links = {"inside": "inside a machine", "between": "between machines"}
        sent = ", ".join(
            f"{kind} {gib(size)} {links[link]}"
            for (kind, link), size in sorted(self.work.sent.items())
            if size >= GIB / 1000
        )
        strategy = self.fsdp.strategy + (f" of {self.fsdp.shard_size}" if self.fsdp.shard_size else "")
        recompute, offloaded = self.fsdp.recompute, ", offloaded" if self.fsdp.cpu_offload else ""
        lines = [
            f"processes   {self.world_size:,}, {strategy}{offloaded}, recompute {recompute}, {self.fsdp.precision}",
            f"peak        {gib(self.peak)} GiB a process, in the {highest}: "
            + ", ".join(f"{kind} {gib(size)}" for kind, size in kinds if size >= self.peak / 1000),
            "phases      " + ", ".join(f"{phase} {gib(peak.size)}" for phase, peak in self.peaks.items()) + " GiB",
            "state       " + ", ".join(f"{kind} {gib(size)}" for kind, size in self.state.items()) + " GiB a process",
            f"host        {gib(self.host)} GiB a process while it saves; a checkpoint {gib(self.checkpoint)} GiB",
            f"sent        {sent + '; GiB a process and step' if sent else 'less than 1 MiB'}",
            f"computed    {self.work.flops / 1e12:.4g} TFLOP a process and step, {self.needed / 1e12:.4g} needed",
            f"not in it   CUDA's context, about {CONTEXT} GiB; "
            + f"NCCL's buffers, about {NCCL}; " * (self.world_size > 1)
            + f"what the allocator loses between pieces, about {FRAGMENTS:.0%}: allow for {gib(self.allowed_for())} GiB",
        ]
        return "\n".join(lines)


def estimate(
    build: Callable[[], Llama],
    world_size: int,
    *,
    fsdp: FsdpConfig,
    optim: OptimConfig,
    batch_size: int,
    context_length: int,
    accumulate: int = 1,
    clip_norm: float = 0.0,
    machine: int = 8,
    memory: float = 80 * GIB,
    device: str = "cuda",
    attention: str = "varlen",
) -> Estimate:
    """Of one step of `batch_size` rows of one document of context_length tokens each, all of them trained.

    build: makes the model on the meta device, with adapters, and what is frozen frozen. machine: processes of one. memory:
    bytes of a device, for --fsdp.strategy auto. device: "cuda" or "cpu", whether this machine has it or not. attention:
    of BACKENDS. Needs a process without a process group. Raises UserError for a number of processes that does not fit.
    """
    if world_size < 1:
        raise UserError(f"--estimate {world_size}: must be at least 1")
    batch = batch_of_zeros(batch_size, context_length)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    micro_batches = [_faked(batch, fake) for _ in range(accumulate)]
    alive = Alive(fake, machine=machine, squares=batch.squares)
    with fake_processes(world_size), estimated_on(device):
        model = build()
        set_dtypes(model, fsdp)
        fsdp = choose_strategy(model, fsdp, device, memory)
        if fsdp.strategy == "hybrid-shard" and not fsdp.shard_size:
            fsdp = replace(fsdp, shard_size=min(machine, world_size))
        model.attention = BACKENDS[attention]
        mesh = make_mesh(fsdp, "cpu")  # FSDP2 does the same for a GPU, on streams
        shard(model, mesh, fsdp)
        if device == "cuda":
            _fuse_norms(model)
        with alive:
            materialise(model, "cpu")
            alive.hold([*model.parameters(), *model.buffers()], "parameters")
            optimizer = make_optimizer(model.parameters(), optim)
            states = [tensor for state in optimizer.state.values() for tensor in state.values()]
            alive.hold(states, "optimizer")
            alive.watch(model, optimizer)
            gradients: list[int] = []
            optimizer.register_step_pre_hook(lambda *_: gradients.append(_size(p.grad for p in model.parameters())))
            for each in micro_batches:
                alive.hold([each.tokens, each.positions, each.targets.rows, each.targets.ids], "activations")
            scaler = LossScaler() if fsdp.precision == "fp16" else None
            model.train()
            train_step(model, optimizer, micro_batches, clip_norm=clip_norm, scaler=scaler)
            alive.phase = "save"
            trained = [p for p in model.parameters() if p.requires_grad]
            copies = [local(tensor).clone() for tensor in (*trained, *states)]  # in host memory
            alive.hold(copies, "host")
        whole = sum(tensor.numel() * tensor.element_size() for tensor in (*trained, *states))
        offloaded = HOST if fsdp.cpu_offload else ()
        state = {"parameters": _size(model.parameters()), "gradients": gradients[0], "optimizer": _size(states)}
        needed = [step_flops(model, b.count, b.trained, b.squares) for b in micro_batches]
        return Estimate(
            world_size,
            machine,
            fsdp,
            alive.peaks(but=("host", *offloaded)),
            state,
            host=_size(copies) + sum(state[kind] for kind in offloaded),
            checkpoint=whole,
            tokens=batch.count * accumulate * world_size,
            needed=sum(needed),
            work=alive.work,
            reads=alive.reads,
        )


def estimate_run(config: C, build: Callable[[C], tuple[Llama, Any]], card: str = "h100-80") -> str:
    """What --estimate says of a recipe's run on config.estimate processes. build: the recipe's own, whose
    second result is not used.

    On the GPU of that name, or on this machine's kind of CPU if --device cpu asks for one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--estimate needs one process, whatever their number in the run: start it without torchrun")
    config = replace(config, model=find_model(config.model, weights=False))
    device = "cpu" if config.device == "cpu" else "cuda"
    fsdp = config.fsdp
    if fsdp.precision == "auto":
        fsdp = replace(fsdp, precision="mixed")
        if device == "cpu":
            fsdp, _ = choose_precision(config.fsdp, device, cache_dir=config.data.cache_dir)
    attention: str = config.kernels.attention
    if attention == "auto":
        attention = "math" if device == "cpu" else "varlen"
    if attention == "flex":  # compiled code, which keeps the same tensors
        attention = "varlen"
    found = estimate(
        lambda: build(config)[0],
        config.estimate,
        fsdp=fsdp,
        optim=config.optim,
        batch_size=config.train.batch_size,
        context_length=config.data.context_length,
        accumulate=config.train.accumulate,
        clip_norm=config.train.clip_norm,
        memory=CARDS[card].memory * GIB,
        device=device,
        attention=attention,
    )
    return str(found) if device == "cpu" else f"{found}\n{described(found, card)}"


def described(found: Estimate, card: str, network: float = NETWORK) -> str:
    """Whether it fits a card, and the least time."""
    overlapped, not_overlapped = found.seconds(CARDS[card], network)
    fits = "fits" if found.allowed_for() <= CARDS[card].memory * GIB else "DOES NOT FIT, see tools/estimate.py --advise"
    return (
        f"{card:11} {fits}, {CARDS[card].memory:.1f} GiB; a step takes at least {overlapped:.3g} s "
        f"({found.tokens / overlapped:,.0f} tokens/s), {not_overlapped:.3g} s if no communication is hidden"
    )


def _size(tensors: Any) -> int:
    parts = [local(tensor) for tensor in tensors if tensor is not None]
    return sum(part.numel() * part.element_size() for part in parts)


def batch_of_zeros(rows: int, length: int) -> Batch:
    """One document a row, each token but the last with a label."""
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    labels = tokens.clone()
    labels[:, -1] = IGNORE
    positions = torch.arange(length).repeat(rows, 1)
    return Batch(tokens, positions, labels, tokens, rows * length, rows * (length - 1), rows * length**2)


def _faked(batch: Batch, fake: FakeTensorMode) -> Batch:
    def copy(tensor: Tensor) -> Tensor:
        return fake.from_tensor(tensor.clone())

    made = replace(batch, tokens=copy(batch.tokens), positions=copy(batch.positions))
    targets = Targets(copy(batch.targets.rows), copy(batch.targets.ids))
    vars(made).update(lengths=batch.lengths, targets=targets)  # on the host, as `collate` makes them
    return made


class _FusedNorm(torch.autograd.Function):
    """The memory of CUDA's kernel, and nothing else: it keeps x, the weight and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def _fuse_norms(model: Llama) -> None:
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.forward = partial(_fused, module)  # type: ignore[method-assign]


def _fused(module: RMSNorm, x: Tensor) -> Tensor:
    return _FusedNorm.apply(x, module.weight)
