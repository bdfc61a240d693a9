"""Cross entropy fused with the output projection: the logits of a batch, its largest tensor, never exist at once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillama.model.autograd import first_derivative_only
from minillama.model.device import device_kind
from minillama.model.transfer import to_device

IGNORE = -100
"""The label of a position that is not trained; PyTorch's default ignore_index."""

CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
"""Bytes of the logits held at a time, counted as fp32; on a CPU four times that if the weight trains."""

CHUNK_ROWS = {"cpu": 256, "cuda": 4096}
"""At most so many rows. CPU: the fastest, measured at vocabularies of 49,152 and 128,256; four times as many if the weight
trains, because each chunk adds to its gradient."""

SLICE_BYTES = {"cpu": 2 * 2**20, "cuda": 512 * 2**20}
"""Bytes of the fp32 logits held at a time: on a CPU few enough to stay in its cache between operations."""


def chunk_rows(vocabulary: int, device: str, weight_trains: bool = False) -> int:
    """How many rows of logits are computed at a time: a multiple of 128 if there are that many."""
    times = 4 if weight_trains and device == "cpu" else 1
    rows = times * min(CHUNK_BYTES[device] // (4 * vocabulary), CHUNK_ROWS[device])
    return max(1, rows // 128 * 128 or rows)


@dataclass(frozen=True, eq=False)
class Targets:
    """The labels of a batch, on the device before the step. FSDP2 and DDP move tensors, but not what is in this class."""

    rows: Tensor
    """(N,) int64: positions in the flattened batch that have a label"""
    ids: Tensor
    """(N,) int64: the labels there"""


def find_targets(labels: Tensor, device: torch.device | str) -> Targets:
    """The targets of labels (B, T), for a model on `device`. Waits for the device unless the labels are on the host."""
    flat = labels.flatten()
    rows = flat.ne(IGNORE).nonzero().flatten()
    return Targets(*(to_device(part, device) if part.is_cpu else part for part in (rows, flat[rows])))


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor | Targets, low: Tensor | None = None, up: Tensor | None = None
) -> Tensor:
    """Sum over all labels but -100 of -log softmax(hidden @ weight.T)[label], in nats: () fp32.

    hidden (B, T, C) and weight (V, C) of one dtype, labels (B, T) int64, or find_targets of them. Positions without a
    label never meet the weight. Zero labels give a zero that still has a graph: such a batch takes part in every collective.
    With low (B, T, R) and up (V, R) low @ up.T, in fp32, is added to the logits: LoRA on the head.
    """
    targets = labels if isinstance(labels, Targets) else find_targets(labels, hidden.device)
    x, low = (None if part is None else part.flatten(0, 1)[targets.rows] for part in (hidden, low))
    return _LinearCrossEntropy.apply(x, weight, targets.ids, low, up, torch.is_grad_enabled())


def linear_log_probabilities(
    hidden: Tensor, weight: Tensor, labels: Tensor | Targets, low: Tensor | None = None, up: Tensor | None = None
) -> Tensor:
    """log softmax(hidden @ weight.T)[label] of each label but -100, in nats, row after row of the batch: (N,) fp32.

    What losses of whole answers are made of. Arguments as for linear_cross_entropy, whose value is minus the sum of these.
    """
    targets = labels if isinstance(labels, Targets) else find_targets(labels, hidden.device)
    x, low = (None if part is None else part.flatten(0, 1)[targets.rows] for part in (hidden, low))
    return _LinearLogProbabilities.apply(x, weight, targets.ids, low, up, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward, chunk by chunk, while a chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, low: Tensor | None, up: Tensor | None, grad_enabled: bool
    ) -> Tensor:
        ctx.dtypes = [None if of is None else of.dtype for of in (x, weight, low, up)]
        losses, gradients = _in_chunks(x, weight, targets, low, up, _needed(ctx, grad_enabled))
        ctx.save_for_backward(*gradients)
        return losses.sum()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # In fp32 (a CPU multiplies by a scalar in fp32 anyway): rounding grad_loss, 1 / trained tokens, would scale the
        # whole gradient. Cast only now: a sum over all rows, not yet divided by their number, can overflow fp16.
        grad_x, grad_weight, grad_low, grad_up = (
            None if grad is None else ((grad if device_kind(grad) == "cpu" else grad.float()) * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return grad_x, grad_weight, None, grad_low, grad_up, None


class _LinearLogProbabilities(torch.autograd.Function):
    """Each row has a gradient of its own coming in, which sums over rows, as dW is, must wait for.

    So the backward computes the logits again, but for a frozen head, where a row's gradient can be scaled afterwards.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, low: Tensor | None, up: Tensor | None, grad_enabled: bool
    ) -> Tensor:
        ctx.needed = _needed(ctx, grad_enabled)
        ctx.frozen_head = ctx.needed == (True, False, False)
        losses, (grad_x, *_) = _in_chunks(
            x, weight, targets, low, up, ctx.needed if ctx.frozen_head else (False, False, False)
        )
        ctx.save_for_backward(*((grad_x,) if ctx.frozen_head else (x, weight, targets, low, up)))
        return losses.neg_()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.frozen_head:
            [grad_x] = ctx.saved_tensors
            return (grad_x * -grad[:, None]).to(grad_x.dtype), None, None, None, None, None
        x, weight, targets, low, up = ctx.saved_tensors
        _, gradients = _in_chunks(x, weight, targets, low, up, ctx.needed, -grad)
        grad_x, grad_weight, grad_low, grad_up = (
            None if of is None else of.to(like.dtype) for of, like in zip(gradients, (x, weight, low, up), strict=True)
        )
        return grad_x, grad_weight, None, grad_low, grad_up, None


Needed = tuple[bool, bool, bool]
"""Whether a gradient is needed of x, of the weight, and of low or up"""


def _needed(ctx: Any, grad_enabled: bool) -> Needed:
    x, weight, _, *low_rank, _ = ctx.needs_input_grad  # which say nothing of no_grad
    return x and grad_enabled, weight and grad_enabled, any(low_rank) and grad_enabled


def _in_chunks(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    needed: Needed,
    factors: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """-log softmax(x W^T + l U^T)[target] of each row, (N,) fp32, and the gradients of their sum, each row's times its
    factor: of x, W, l and U.

    With p = softmax(x W^T + l U^T) and one-hot y: dloss/dx = (p - y) W and dloss/dW = (p - y)^T x; likewise of l and U.
    """
    x_needs_grad, weight_needs_grad, low_rank_needs_grad = needed
    up = None if up is None else up.float()
    losses = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    grad_x = torch.empty_like(x) if x_needs_grad else None
    grad_weight = None
    grad_low = grad_up = None
    if low is not None and up is not None and low_rank_needs_grad:
        grad_low, grad_up = torch.empty_like(low), torch.zeros_like(up)
    chunk = min(chunk_rows(weight.shape[0], device_kind(x), weight_needs_grad), max(1, x.shape[0]))
    piece = max(1, min(chunk, SLICE_BYTES[device_kind(x)] // (4 * weight.shape[0])))
    # In memory that stays: on a CPU, to take new memory costs more than what is done in it.
    products = x.new_empty(chunk, weight.shape[0])
    scratch = torch.empty(piece, weight.shape[0], dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[0], chunk):
        x_chunk = x[start : start + chunk]
        product = torch.mm(x_chunk, weight.T, out=products[: len(x_chunk)])
        for first in range(0, len(x_chunk), piece):
            part = product[first : first + piece]
            rows = slice(start + first, start + first + len(part))
            target = targets[rows, None]
            logits = scratch[: len(part)].copy_(part)
            if low is not None and up is not None:
                logits += low[rows].float() @ up.T
            highest, at_target = logits.amax(-1, keepdim=True), logits.gather(1, target)
            # In place, which softmax can do as it reads each logit for the last time where it writes. The largest
            # probability is 1 / sum(exp(logits - highest)).
            probabilities = torch.softmax(logits, -1, out=logits)
            losses[rows] = (highest - probabilities.amax(-1, keepdim=True).log() - at_target)[:, 0]
            if grad_x is None and not weight_needs_grad and grad_low is None:
                continue
            error = probabilities.scatter_add_(1, target, torch.full_like(at_target, -1))
            if factors is not None:
                error *= factors[rows, None]
            if grad_low is not None and grad_up is not None:
                assert low is not None and up is not None
                grad_low[rows] = (error @ up).to(low.dtype)
                grad_up += error.T @ low[rows].float()
            part.copy_(error)
        if grad_x is not None:
            torch.mm(product, weight, out=grad_x[start : start + chunk])
        if weight_needs_grad:
            of_chunk = _summed_products(product, x_chunk)
            grad_weight = of_chunk if grad_weight is None else grad_weight.float().add_(of_chunk)
    if weight_needs_grad and grad_weight is None:
        grad_weight = torch.zeros_like(weight)
    return losses, (grad_x, grad_weight, grad_low, grad_up)


def _summed_products(error: Tensor, x: Tensor) -> Tensor:
    """error^T x, summed over the rows of a chunk. In fp16, which ends at 65,504, it uses x / 64 and returns fp32: a loss
    scale comes later and could not undo an overflow here."""
    if x.dtype != torch.float16:
        return error.T @ x
    return (error.T @ (x / 64)).float().mul_(64)
