"""The numerics that must be the same in every recipe: one optimizer step, and the evaluation."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from minillama.distributed import all_reduce, local, process_count, reshard, sum_gradients, summed_gradients
from minillama.errors import UserError
from minillama.optim import LossScaler
from minillama.packing import Batch, Packed, collate


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and on how much at a time."""

    epochs: int = 3
    """Times through the training set."""
    max_steps: int = 0
    """Stop after this many optimizer steps; 0: after the epochs."""
    batch_size: int = 4
    """Packs (padding: rows of data) that each process takes at a time."""
    accumulate: int = 1
    """Micro-batches whose gradients are added up to one step, of batch-size x accumulate x processes packs."""
    clip_norm: float = 0.0
    """Scale the gradient down to this norm where it is longer; 0: never."""
    freeze_layers: int = 0
    """Full fine-tuning: keep this many of the first blocks, and the embedding, as they are."""

    def __post_init__(self) -> None:
        least_values = {"epochs": 1, "max_steps": 0, "batch_size": 1, "accumulate": 1, "clip_norm": 0}
        for name, least in (least_values | {"freeze_layers": 0}).items():
            if not least <= getattr(self, name) < math.inf:
                raise UserError(f"--train.{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")

    def begin(self, world_size: int) -> "Progress":
        """Where a run on so many ranks starts, unless it resumes."""
        return Progress(window=self.batch_size * self.accumulate * world_size)


@dataclass(frozen=True)
class EvalConfig:
    """Loss on held-out rows."""

    enabled: bool = True
    """Evaluate before training, at the end, and as --eval.every says."""
    every: int = 0
    """Steps between evaluations; 0: after each epoch."""
    max_steps: int = 0
    """Batches per process in an evaluation; 0: all."""
    batch_size: int = 1
    """Packs (padding: rows of data) that each process evaluates at a time."""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("max_steps", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--eval.{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")

    def due(self, step: "Step") -> bool:
        """Whether to evaluate once this step is made."""
        return step.is_last or ((step.number + 1) % self.every == 0 if self.every else step.ends_epoch)


@dataclass(frozen=True)
class Progress:
    """How far a run has come: all that decides what its next step trains on, whoever takes it."""

    window: int
    """Packs a step"""
    step: int = 0
    """Optimizer steps made"""
    epoch: int = 0
    cursor: int = 0
    """Packs of this epoch's order that were trained on, over all ranks"""
    tokens: int = 0
    """Trained on so far"""
    unlogged: Sequence[float] = (0.0, 0.0, 0, 0, 0)
    """Since the last line of metrics.jsonl, over all ranks: losses times trained tokens, seconds, tokens, trained tokens,
    squares of the documents' lengths"""
    evaluate: bool = True
    """Whether an evaluation is due before the next step"""


@dataclass(frozen=True)
class Step:
    """One optimizer step to be made."""

    number: int
    """Counted from 0"""
    epoch: int
    """Counted from 0"""
    cursor: int
    """Packs of this epoch's order that are done when this step is"""
    progress: float
    """Epochs done when this step is, like 1.25"""
    ends_epoch: bool
    is_last: bool
    """Of the run"""
    micro_batches: list[np.ndarray]
    """The packs of each micro-batch of this rank"""


def count_steps(packed: Packed, config: TrainConfig, window: int) -> int:
    """Optimizer steps of a run that takes `window` packs a step."""
    per_epoch = -(-len(packed) // window)
    return min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)


def steps(
    packed: Packed, config: TrainConfig, seed: int, rank: int, world_size: int, start: Progress
) -> Iterator[Step]:
    """What each step from `start` on trains on.

    Every epoch takes every pack once, in an order of its own; its last step may be short. A step's packs do not depend
    on the number of ranks: each takes its share of them, in as many micro-batches of config.batch_size as that needs.
    """
    packs, window, number = len(packed), start.window, start.step
    total = count_steps(packed, config, window)
    for epoch in range(start.epoch, config.epochs):
        for cursor in range(start.cursor if epoch == start.epoch else 0, packs, window):
            if number >= total:
                return
            taken = packed.order(seed, epoch, cursor, cursor + window)
            mine = packed.micro_batches(taken, config.batch_size, rank, world_size)
            end = min(cursor + window, packs)
            yield Step(number, epoch, end, epoch + end / packs, end == packs, number + 1 == total, mine)
            number += 1


def prefetched(
    steps: Iterable[Step], load: Callable[[Step], list[Batch]]
) -> Iterator[tuple[Step, Future[list[Batch]]]]:
    """Each step with load(step), which a thread computes while the step before is made: the result raises what load did."""
    # a new thread is on the first GPU, whatever the process is on
    place = partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_initialized() else None
    with ThreadPoolExecutor(1, initializer=place) as thread:
        waiting = None
        for step in steps:
            coming = step, thread.submit(load, step)
            if waiting:
                yield waiting
            waiting = coming
        if waiting:
            yield waiting


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    *,
    clip_norm: float = 0.0,
    scaler: LossScaler | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimizer step over the micro-batches of all ranks, of which each rank must bring equally many.

    The loss is the sum over all trained tokens of the step, of all micro-batches and ranks, divided by their number, so
    it does not depend on how the samples are split. Returns (loss, norm of the gradient before clipping), both fp32 ():
    reading them waits for the device. No trained token at all: loss and gradient are 0. Nothing here waits for it, but
    for a scaler, which must know whether the norm is finite, and offloaded gradients.

    On several processes the model is what `shard` made, or a user's own fully_shard, whose gradients are from now on
    summed and not averaged, or DistributedDataParallel; without a process group this one is alone. Raises UserError, on
    every rank and with the weights as they were, for a parameter whose gradient is not summed over all processes.

    With a scaler, for fp16, the gradients are those of the loss times scaler.scale until they are summed up; a step whose
    norm is not finite is skipped. The norm is one number for all ranks, so they all skip or none does.
    """
    device = micro_batches[0].tokens.device
    scale = scaler.scale if scaler else 1.0
    sum_gradients(model)
    factor = process_count() if isinstance(model, DistributedDataParallel) else 1  # it can only average
    trained = torch.full((), float(sum(batch.trained for batch in micro_batches)), device=device)
    _all_reduce(trained)
    trained.clamp_(min=1)
    total = torch.zeros((), device=device)
    for number, batch in enumerate(micro_batches, 1):
        last = number == len(micro_batches)  # replicas add up their micro-batches before they meet
        if isinstance(model, FSDPModule):
            model.set_requires_all_reduce(last)
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
            loss = batch_loss(model, batch) / trained
            (loss * (scale * factor)).backward()
        total += loss.detach()
    _all_reduce(total)
    gradients = summed_gradients(model)
    if scaler:
        _multiply(gradients, 1 / scale)
    norm = gradient_norm(gradients)
    if clip_norm:  # as clip_grads_with_norm_, which does not take plain gradients and DTensors together
        _multiply(gradients, (clip_norm / (norm + 1e-6)).clamp(max=1))
    finite = scaler is None or bool(norm.isfinite())
    if finite:
        optimizer.step()
    if scaler:
        scaler.update(finite)
    optimizer.zero_grad()
    return total, norm


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm of all gradients together, computed in fp32 whatever their dtype: (). Of none: 0.

    Plain gradients are taken to be alike on all ranks. Of DTensors, on one mesh or several, every rank must bring its part.
    """
    parts: dict[tuple[tuple[DeviceMesh, int], ...], list[Tensor]] = {}  # by the dimensions of meshes that split them
    for gradient in gradients:
        split: list[tuple[DeviceMesh, int]] = []
        if isinstance(gradient, DTensor):
            if any(placement.is_partial() for placement in gradient.placements):
                gradient = gradient.redistribute(placements=[Replicate()] * gradient.device_mesh.ndim)
            placed = enumerate(gradient.placements)
            split = [(gradient.device_mesh, d) for d, placement in placed if not placement.is_replicate()]
        parts.setdefault(tuple(split), []).append(local(gradient))
    total = None
    for split_along, tensors in parts.items():
        squared = torch.stack(torch._foreach_norm(tensors, 2, torch.float32)).square().sum()
        for mesh, dimension in split_along:
            dist.all_reduce(squared, group=mesh.get_group(dimension))
        total = squared if total is None else total + squared.to(total.device)
    return torch.zeros(()) if total is None else total.sqrt()


def _multiply(gradients: Sequence[Tensor], factor: float | Tensor) -> None:
    if gradients:
        torch._foreach_mul_([local(gradient) for gradient in gradients], factor)


def _all_reduce(number: Tensor) -> None:
    if dist.is_initialized():
        dist.all_reduce(number)


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Loss summed over a batch's labels: fp32 ()."""
    return model(batch.tokens, positions=batch.positions, lengths=batch.lengths, labels=batch.targets)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], stopping: Callable[[], bool] = lambda: False
) -> tuple[float, int] | None:
    """(Mean loss a trained token in nats, number of trained tokens) over the batches of all ranks.

    Every rank must bring equally many. None once `stopping`, asked before each batch and of one mind on all ranks, says
    so. Raises UserError if there is nothing to predict.
    """
    was_training = model.training
    model.eval()
    total, trained, device = None, 0, torch.device("cpu")
    stopped = False
    for batch in batches:
        if stopped := stopping():
            break
        device = batch.tokens.device
        loss = batch_loss(model, batch).double()
        total = loss if total is None else total + loss
        trained += batch.trained
    model.train(was_training)
    reshard(model)
    if stopped:
        return None
    summed = 0.0 if total is None else total.item()
    summed, trained_everywhere = all_reduce([summed, trained], device=device)
    if not trained_everywhere:
        raise UserError("the validation set has no token to predict")
    return summed / trained_everywhere, int(trained_everywhere)


def eval_batches(
    packed: Packed, config: EvalConfig, pad_id: int, device: torch.device | str, rank: int, world_size: int
) -> Iterator[Batch]:
    """The validation packs of this rank, each pack once over all ranks; equally many batches on every rank.

    config.max_steps takes the same mixed sample of them each time, whatever the run's seed.
    """
    window = config.batch_size * world_size
    for cursor in range(0, len(packed), window)[: config.max_steps or None]:
        taken = packed.order(0, 0, cursor, cursor + window)
        [packs] = packed.micro_batches(taken, config.batch_size, rank, world_size)
        yield collate(packed, packs, pad_id, device)
