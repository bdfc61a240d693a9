"""Causal attention within documents, written out in matrix products: a block of queries at a time, any device and dtype.

An operator of PyTorch's, so that torch.compile and selective recomputation see one operation, not a loop whose length
depends on the documents. Saves only its inputs for the backward, and holds the scores of one block at a time.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, library

QUERIES = 128
"""At most so many tokens a block; their scores are computed together for all query heads of a key head."""
SCORES = 2**20
"""So many fp32 scores fit in a core's cache: with many keys a block has fewer tokens, with few keys more key heads."""


@library.custom_op("minillama::blockwise_attention", mutates_args=())
def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """q (N, H, D), k and v (N, K, D) -> (N, H, D); cu_seqlens: (documents + 1,) int64 on the host, from 0 to N.

    Scores and sums are fp32, and so are the probabilities, unless bf16 products are the faster ones (AMX, BFMMLA): there
    bf16 attention rounds them to bf16, as flash attention does.
    """
    out = q.new_empty(q.shape)
    q, out_heads = (x.unflatten(1, (k.shape[1], -1)) for x in (q, out))
    power, rest = _scale(q)
    keys, values = _by_head(k).mul_(power), _by_head(v)
    blocks = list(_blocks(cu_seqlens, q))
    scores, later = _scratch(blocks, q, torch.float32), _later(q)
    with _onednn(q.dtype):
        for seen, block, heads in blocks:
            p = _probabilities(_rows(q[block, heads]).float(), keys[heads, seen], rest, scores, later, block)
            out_heads[block, heads] = _tokens(torch.bmm(p, values[heads, seen]), block)
    return out


@library.custom_op("minillama::blockwise_attention_backward", mutates_args=())
def blockwise_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. With S = scale q k^T, P = softmax(S), O = P v: dv = P^T dO, dP = dO v^T,
    dS = P (dP - rowsum(P dP)), dq = scale dS k, dk = scale dS^T q."""
    grad_q = q.new_empty(q.shape)
    grad, q, grad_q_heads = (x.unflatten(1, (k.shape[1], -1)) for x in (grad, q, grad_q))
    keys, values = _by_head(k), _by_head(v)
    half_keys = keys.to(k.dtype, copy=True)
    power, rest = _scale(q)
    for scaled in (keys, values):
        scaled.mul_(power)
    grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)
    blocks = list(_blocks(cu_seqlens, q))
    scores, grads, halves = (_scratch(blocks, q, dtype) for dtype in (torch.float32, torch.float32, q.dtype))
    later = _later(q)
    with _onednn(q.dtype):
        for seen, block, heads in blocks:
            q_rows, grad_rows = _rows(q[block, heads]), _rows(grad[block, heads])
            p = _probabilities(q_rows.float(), keys[heads, seen], rest, scores, later, block)
            half = _room(halves, p.shape).copy_(p)
            grad_v[heads, seen] += torch.bmm(half.mT, grad_rows)
            grad_p = torch.bmm(grad_rows.float(), values[heads, seen].mT, out=_room(grads, p.shape))
            if rest != 1:
                grad_p.mul_(rest)
            half.copy_(torch._softmax_backward_data(grad_p, p, -1, p.dtype, grad_input=grad_p))
            grad_q_heads[block, heads] = _tokens(torch.bmm(half, half_keys[heads, seen]), block)
            grad_k[heads, seen] += torch.bmm(half.mT, q_rows)
    grad_k, grad_v = (x.transpose(0, 1).to(k.dtype).contiguous() for x in (grad_k, grad_v))
    return grad_q, grad_k, grad_v


@blockwise_attention.register_fake
def _(q, k, v, cu_seqlens):
    return q.new_empty(q.shape)


@blockwise_attention_backward.register_fake
def _(grad, q, k, v, cu_seqlens):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


blockwise_attention.register_autograd(
    lambda ctx, grad: (*blockwise_attention_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _blocks(cu_seqlens: Tensor, q: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """For each block of q (N, K, H / K, D): the keys it attends to, its queries, its key heads."""
    _, kv_heads, group, _ = q.shape
    for start, end in pairwise(cu_seqlens.tolist()):
        rows = min(QUERIES, max(16, SCORES // (group * (end - start))))
        for first in range(start, end, rows):
            last = min(first + rows, end)
            together = max(1, SCORES // (group * (last - first) * (last - start)))
            for head in range(0, kv_heads, together):
                yield slice(start, last), slice(first, last), slice(head, min(head + together, kv_heads))


def _scratch(blocks: list[tuple[slice, slice, slice]], q: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the scores of any block. Allocating it for each would take as long as the products."""
    sizes = (math.prod(part.stop - part.start for part in block) for block in blocks)
    return torch.empty(max(sizes, default=0) * q.shape[2], dtype=dtype, device=q.device)


def _room(scratch: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    return scratch[: math.prod(shape)].view(shape)


def _later(q: Tensor) -> Tensor:
    """Added to the scores of a block's own tokens, so that none attends to a later one."""
    return torch.full((QUERIES, QUERIES), -torch.inf, device=q.device).triu_(1)


def _scale(q: Tensor) -> tuple[float, float]:
    """D^-0.5 as a power of two, by which keys can be multiplied and stay exact, and the rest, for their many products."""
    mantissa, exponent = math.frexp(q.shape[-1] ** -0.5)
    return 2.0 ** (exponent - 1), 2 * mantissa


def _by_head(x: Tensor) -> Tensor:
    """(N, K, D) -> (K, N, D) fp32"""
    return x.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _rows(x: Tensor) -> Tensor:
    """(tokens, K, H / K, D) -> (K, H / K * tokens, D): one product for all query heads of a key head"""
    return x.permute(1, 2, 0, 3).flatten(1, 2)


def _tokens(x: Tensor, block: slice) -> Tensor:
    """The inverse of _rows."""
    return x.unflatten(1, (-1, block.stop - block.start)).permute(2, 0, 1, 3)


def _probabilities(q: Tensor, keys: Tensor, scale: float, scratch: Tensor, later: Tensor, block: slice) -> Tensor:
    """softmax(scale q keys^T), computed in scratch. The last keys are those of the block's own tokens."""
    scores = torch.bmm(q, keys.mT, out=_room(scratch, (*q.shape[:2], keys.shape[1])))
    if scale != 1:
        scores.mul_(scale)
    own = block.stop - block.start
    scores.unflatten(1, (-1, own))[..., -own:] += later[:own, :own]
    return torch.softmax(scores, -1, out=scores)


@contextmanager
def _onednn(dtype: torch.dtype) -> Iterator[None]:
    """Lets oneDNN make the fp32 products of bf16 attention, twice to three times as fast as MKL on AMD's processors.

    PyTorch uses oneDNN only if it may round the factors to bf16. It rounds only on processors with fast bf16 products (AMX,
    ARM's BFMMLA), and there all factors but the probabilities were bf16 before.
    """
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    if dtype == torch.bfloat16:
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
