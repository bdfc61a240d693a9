"""Causal attention within documents, by several kernels."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minillama.model.blockwise import blockwise_attention
from minillama.model.transfer import to_device

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def document_lengths(document_ids: Tensor) -> list[int]:
    """Lengths of the documents of a batch, row after row: those of document_ids (B, T) add up to B * T.

    A document is a run of equal ids within a row. Waits for the device unless the ids are on the host.
    """
    ids = document_ids.cpu()
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = first.flatten().nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], ids.numel()], strict=True)]


class AttentionContext(Protocol):
    """Which tokens of a batch attend to which. It is the same in every layer, so it is made once a forward."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D)) v over the keys attended to; each kv head serves H / K query heads.

        q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D).
        """
        ...


class PerDocument:
    """PyTorch's scaled_dot_product_attention, one call a document: there is no mask, and nothing masked is computed."""

    def __init__(self, lengths: list[int], device: torch.device, only: SDPBackend | None = None) -> None:
        """only: the implementation it must take; by default the best that there is."""
        self.lengths, self.only = lengths, only

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with nullcontext() if self.only is None else sdpa_kernel(self.only):
            if len(set(self.lengths)) == 1:
                alike = [x.reshape(-1, self.lengths[0], *x.shape[2:]) for x in (q, k, v)]
                return _causal(*alike).reshape(q.shape)
            # `split`, unlike slicing, has one concatenation as its backward.
            split = [x.flatten(0, 1).split(self.lengths) for x in (q, k, v)]
            return torch.cat([_causal(*(x[None] for x in parts))[0] for parts in zip(*split, strict=True)]).view_as(q)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


class Blockwise:
    """Matrix products and a softmax in fp32, see blockwise.py: on any device."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.cu_seqlens = _cu_seqlens(lengths)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return blockwise_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), self.cu_seqlens).view_as(q)


class Varlen:
    """FlashAttention over documents of different lengths in one call: CUDA, bf16 or fp16."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.cu_seqlens, self.longest = to_device(_cu_seqlens(lengths).int(), device), max(lengths)
        self.kernel, self.groups_heads = _varlen()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape, q, k, v = q.shape, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        if not self.groups_heads:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return self.kernel(q, k, v, self.cu_seqlens, self.cu_seqlens, self.longest, self.longest).view(shape)


@cache
def _varlen() -> tuple[Callable[..., Any], bool]:
    """PyTorch's varlen_attn with this version's option for causal attention, and whether it supports grouped query heads."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    groups_heads = "enable_gqa" in known
    if groups_heads:
        options["enable_gqa"] = True
    return partial(varlen_attn, **options), groups_heads


class Flex:
    """FlexAttention, which skips blocks of scores between different documents. It has no backward on a CPU."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.mask, self.kernel = document_mask(lengths, device), _flex()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x.flatten(0, 1).transpose(0, 1)[None] for x in (q, k, v)]
        return self.kernel(*rows, block_mask=self.mask, enable_gqa=True)[0].transpose(0, 1).reshape(q.shape)


@cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def document_mask(lengths: list[int], device: torch.device) -> "BlockMask":
    """FlexAttention's mask of the flattened batch: which blocks it computes, and which of these need no mask.

    Made from the lengths alone. FlexAttention's own create_block_mask would fill a (tokens, tokens) mask.
    """
    from torch.nn.attention.flex_attention import BlockMask

    size, tokens = 128, sum(lengths)
    ends = _cu_seqlens(lengths)[1:]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    first = torch.arange(0, tokens, size)
    last = (first + size).clamp(max=tokens) - 1
    start = torch.tensor([0, *ends.tolist()])[document[first]]  # of the document of a block's first token
    block = torch.arange(len(first))
    seen = (block <= block[:, None]) & (last >= start[:, None])
    of_one = (document[first] == document[last]) & (last - first == size - 1)
    whole = seen & (block < block[:, None]) & (first >= start[:, None]) & of_one[:, None]

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks each row has, and their indices first."""
        order = blocks.int().argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]

    on_device = to_device(document, device)

    def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (on_device[query] == on_device[key]) & (query >= key)

    # BlockMask.to() would wait for each of its tensors, and it has twice as many.
    counts, indices, whole_counts, whole_indices = (
        to_device(part, device) for part in (*listed(seen & ~whole), *listed(whole))
    )
    return BlockMask.from_kv_blocks(
        counts, indices, whole_counts, whole_indices, size, mask, seq_lengths=(tokens, tokens)
    )


def _cu_seqlens(lengths: list[int]) -> Tensor:
    """Where each document starts, and where the last ends: (documents + 1,) int64."""
    return torch.tensor([0, *accumulate(lengths)])


BACKENDS: dict[str, Callable[[list[int], torch.device], AttentionContext]] = {
    "sdpa": PerDocument,
    "flash": partial(PerDocument, only=SDPBackend.FLASH_ATTENTION),
    "math": Blockwise,
    "varlen": Varlen,
    "flex": Flex,
}
"""Each is called with the lengths of the documents, in the order of the flattened batch, and the device. A token attends
to itself and the earlier tokens of its document. Nothing waits for the device.

A fork's own attention may attend to fewer tokens. Then it has a function `visible(queries, keys)` of positions in the
document, (B, T, 1) and (B, 1, S), that returns which: (B, T, S) bool. Generation uses it with its key-value cache."""
