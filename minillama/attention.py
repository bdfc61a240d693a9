"""Causal attention within documents."""

import torch
import torch.nn.functional as F
from torch import Tensor


def document_lengths(document_ids: Tensor) -> list[int]:
    """Lengths of the documents of a batch, row after row: those of document_ids (B, T) add up to B * T.

    A document is a run of equal ids within a row. Waits for the device unless the ids are on the host.
    """
    ids = document_ids.cpu()
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = first.flatten().nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], ids.numel()], strict=True)]


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None = None) -> Tensor:
    """Causal softmax(q k^T / sqrt(D)) v, each kv head serving H / K query heads.

    q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D). With `lengths`, of the documents that follow each other in
    the flattened batch, a token sees only the earlier tokens of its own document.
    """
    if lengths is None:
        return _causal(q, k, v)
    # One call a document: the work is the sum of the squares of their lengths, not the square of the sum, and no mask
    # is ever built. `split`, unlike slicing, has one concatenation as its backward.
    parts = [tensor.flatten(0, 1).split(lengths) for tensor in (q, k, v)]
    outs = [_causal(*(part[None] for part in parts_of_one))[0] for parts_of_one in zip(*parts, strict=True)]
    return torch.cat(outs).view_as(q)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)
