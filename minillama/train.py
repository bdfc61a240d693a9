"""The numerics that must be the same in every recipe: one optimizer step, and the evaluation."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minillama.distributed import all_reduce, reshard
from minillama.errors import UserError
from minillama.packing import Batch, Packed, collate, epoch_order, split_window


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and on how much at a time."""

    epochs: int = 3
    """Times through the training set."""
    max_steps: int = 0
    """Stop after this many optimizer steps; 0: after the epochs."""
    batch_size: int = 4
    """Packs of --data.context-length tokens that each process takes at a time."""
    accumulate: int = 1
    """Micro-batches whose gradients are added up to one step. A step sees batch-size x accumulate x processes packs."""
    clip_norm: float = 0.0
    """Scale the gradient down to this norm where it is longer; 0: never."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("max_steps", 0), ("batch_size", 1), ("accumulate", 1), ("clip_norm", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise UserError(f"--train.{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")


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
    """Packs that each process evaluates at a time."""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("max_steps", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--eval.{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")


@dataclass(frozen=True)
class Step:
    """One optimizer step to be made."""

    number: int
    """Counted from 0"""
    epoch: int
    """Counted from 0"""
    progress: float
    """Epochs done when this step is, like 1.25"""
    ends_epoch: bool
    micro_batches: list[np.ndarray]
    """The packs of each micro-batch of this rank"""


def count_steps(packs: int, config: TrainConfig, world_size: int) -> int:
    """Optimizer steps of a run over `packs` packs."""
    per_epoch = -(-packs // (config.batch_size * config.accumulate * world_size))
    return min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)


def steps(packs: int, config: TrainConfig, seed: int, rank: int, world_size: int) -> Iterator[Step]:
    """What each step trains on. Every epoch takes every pack once, in an order of its own; its last step may be short."""
    number, window = 0, config.batch_size * config.accumulate * world_size
    last = count_steps(packs, config, world_size)
    for epoch in range(config.epochs):
        order = epoch_order(packs, seed, epoch)
        for cursor in range(0, packs, window):
            if number == last:
                return
            mine = split_window(order[cursor : cursor + window], config.batch_size, rank, world_size)
            end = min(cursor + window, packs)
            yield Step(number, epoch, epoch + end / packs, end == packs, mine)
            number += 1


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Batch], *, clip_norm: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One optimizer step over the micro-batches of all ranks, of which each rank must bring equally many.

    The loss is the sum over all trained tokens of the step, of all micro-batches and ranks, divided by their number, so
    it does not depend on how the samples are split. Returns (loss, norm of the gradient before clipping), both fp32 ()
    on the device: reading them waits for it. No trained token at all: loss and gradient are 0.
    """
    device = micro_batches[0].tokens.device
    trained = torch.full((), float(sum(batch.trained for batch in micro_batches)), device=device)
    dist.all_reduce(trained)
    trained.clamp_(min=1)
    total = torch.zeros((), device=device)
    for batch in micro_batches:
        loss = batch_loss(model, batch) / trained
        loss.backward()
        total += loss.detach()
    dist.all_reduce(total)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = nn.utils.get_total_norm(parameter.grad for parameter in parameters if parameter.grad is not None)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if clip_norm:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    optimizer.step()
    optimizer.zero_grad()
    return total, norm


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Loss summed over a batch's labels: fp32 ()."""
    return model(batch.tokens, positions=batch.positions, document_ids=batch.document_ids, labels=batch.labels)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch]) -> tuple[float, int]:
    """(Mean loss a trained token in nats, number of trained tokens) over the batches of all ranks.

    Every rank must bring equally many. Raises UserError if there is nothing to predict.
    """
    was_training = model.training
    model.eval()
    total, trained, device = torch.zeros((), dtype=torch.float64), 0, torch.device("cpu")
    for batch in batches:
        device = batch.tokens.device
        total = total.to(device) + batch_loss(model, batch)
        trained += batch.trained
    model.train(was_training)
    reshard(model)
    loss, trained_everywhere = all_reduce([total.item(), trained], device=device)
    if not trained_everywhere:
        raise UserError("the validation set has no token to predict")
    return loss / trained_everywhere, int(trained_everywhere)


def eval_batches(
    packed: Packed, config: EvalConfig, pad_id: int, device: torch.device | str, rank: int, world_size: int
) -> Iterator[Batch]:
    """The validation packs of this rank, each pack once over all ranks; equally many batches on every rank."""
    for packs in split_window(np.arange(len(packed.packs)), config.batch_size, rank, world_size)[
        : config.max_steps or None
    ]:
        yield collate(packed, packs, pad_id, device)
