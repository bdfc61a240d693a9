"""The numerics that must be the same in every recipe: one optimizer step, and the evaluation."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from minillama.data.batch import Batch
from minillama.errors import UserError
from minillama.parallel.processes import all_reduce, process_count
from minillama.parallel.sharding import local, reshard, sum_gradients, summed_gradients
from minillama.training.optim import LossScaler


class Loss(Protocol):
    """What a model is trained on: of each batch a sum over what is counted, by whose number in all batches it is divided."""

    names: tuple[str, ...]
    """What metrics.jsonl tells besides, first the number of what is counted, then means over it; () for trained tokens"""
    sums: Tensor
    """(names,) fp64: what calls have added up since they were last told"""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum: fp32 (), with a graph, even of nothing"""

    def count(self, batch: Batch) -> int: ...


class CrossEntropy:
    """That of the next token, in nats a trained token."""

    names: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.sums = torch.zeros(0, dtype=torch.float64)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch_loss(model, batch)

    def count(self, batch: Batch) -> int:
        return batch.trained


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    *,
    clip_norm: float = 0.0,
    scaler: LossScaler | None = None,
    loss_function: Loss | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimizer step over the micro-batches of all ranks. Each rank must have the same number of them.

    The loss is the sum over all trained tokens of the step, of all micro-batches and ranks, divided by their number, so
    it does not depend on how the samples are split. Returns (loss, norm of the gradient before clipping), both fp32 ().
    Without any trained token, loss and gradient are 0. Nothing here waits for the device, except with a scaler, which
    must know whether the norm is finite, and with offloaded gradients. loss_function: another than
    the cross entropy, and what it counts instead of tokens.

    On several processes the model is sharded by `shard` or by the user's own fully_shard (whose gradients are summed from
    now on, not averaged), or it is a DistributedDataParallel. Raises UserError, on every rank and with unchanged weights,
    for a parameter whose gradient is not summed over all processes.

    With a scaler, for fp16, gradients are those of the loss times scaler.scale until they are summed. A step whose norm is
    not finite is skipped. The norm is the same on all ranks, so all skip or none does.
    """
    loss_function = loss_function or CrossEntropy()
    device = micro_batches[0].tokens.device
    scale = scaler.scale if scaler else 1.0
    sum_gradients(model)
    factor = process_count() if isinstance(model, DistributedDataParallel) else 1  # DDP can only average
    count = torch.full((), float(sum(loss_function.count(batch) for batch in micro_batches)), device=device)
    _all_reduce(count)
    count.clamp_(min=1)
    total = torch.zeros((), device=device)
    for number, batch in enumerate(micro_batches, 1):
        last = number == len(micro_batches)  # replicas accumulate their micro-batches before they reduce
        if isinstance(model, FSDPModule):
            model.set_requires_all_reduce(last)
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
            loss = loss_function(model, batch) / count
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

    Plain gradients must be the same on all ranks. Of DTensors, on one mesh or several, every rank must pass its part.
    """
    parts: dict[tuple[tuple[DeviceMesh, int], ...], list[Tensor]] = {}  # grouped by the mesh dimensions that shard them
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
    model: nn.Module,
    batches: Iterable[Batch],
    stopping: Callable[[], bool] = lambda: False,
    loss_function: Loss | None = None,
) -> tuple[float, int] | None:
    """(Mean loss a trained token in nats, number of trained tokens) over the batches of all ranks; or of loss_function.

    Every rank must have the same number of batches. None if `stopping`, called before each batch and consistent across
    ranks, returns true. Raises UserError if there is nothing to predict.
    """
    loss_function = loss_function or CrossEntropy()
    was_training = model.training
    model.eval()
    total, count, device = None, 0, torch.device("cpu")
    stopped = False
    for batch in batches:
        if stopped := stopping():
            break
        device = batch.tokens.device
        loss = loss_function(model, batch).double()
        total = loss if total is None else total + loss
        count += loss_function.count(batch)
    model.train(was_training)
    reshard(model)
    if stopped:
        return None
    summed = 0.0 if total is None else total.item()
    summed, count_everywhere = all_reduce([summed, count], device=device)
    if not count_everywhere:
        raise UserError("the validation set has no token to predict")
    return summed / count_everywhere, int(count_everywhere)
