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


def attend(q: Tensor, k: Tensor, v: Tensor, seen: "list[int] | KvCache | None" = None) -> Tensor:
    """Causal softmax(q k^T / sqrt(D)) v, each kv head serving H / K query heads.

    q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D). What else a token sees, or not:
    - lengths of the documents that follow each other in the flattened batch: only the earlier tokens of its own;
    - a KvCache: also the tokens of the calls before.
    """
    if seen is None:
        return _causal(q, k, v)
    if isinstance(seen, KvCache):
        return seen.attend(q, k, v)
    lengths = seen
    # One call a document: the work is the sum of the squares of their lengths, not the square of the sum, and no mask
    # is ever built. `split`, unlike slicing, has one concatenation as its backward.
    parts = [tensor.flatten(0, 1).split(lengths) for tensor in (q, k, v)]
    outs = [_causal(*(part[None] for part in parts_of_one))[0] for parts_of_one in zip(*parts, strict=True)]
    return torch.cat(outs).view_as(q)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


class KvCache:
    """Keys and values of the tokens a model has seen, for generation: each call of the model brings the next ones.

    The first call brings prompts of unlike lengths side by side, padded on the left; the layers call in their order.
    """

    def __init__(self, num_layers: int, max_length: int, padding: Tensor) -> None:
        """padding: (B,) integers, how many places at each row's start are padding."""
        self.length = 0
        """Tokens a row has seen, padding too"""
        self.padding, self._padded = padding, bool(padding.any())
        self._max_length, self._layer = max_length, 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._num_layers = num_layers

    def positions(self, count: int) -> Tensor:
        """(B, count): the places in their documents of the next `count` tokens; those of padding are 0."""
        places = torch.arange(self.length, self.length + count, device=self.padding.device)
        return (places - self.padding[:, None]).clamp(min=0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The new tokens' attention: q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D)."""
        layer, start, end = self._layer, self.length, self.length + q.shape[1]
        if layer == len(self._keys):
            shape = (k.shape[0], k.shape[2], self._max_length, k.shape[3])
            self._keys.append(k.new_empty(shape))
            self._values.append(v.new_empty(shape))
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, start:end], values[:, :, start:end] = k.transpose(1, 2), v.transpose(1, 2)
        self._layer = (layer + 1) % self._num_layers
        if self._layer == 0:
            self.length = end
        grouped = q.shape[2] != k.shape[2]
        mask = self._mask(start, end) if self._padded else None
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys[:, :, :end],
            values[:, :, :end],
            attn_mask=mask,
            is_causal=mask is None and start == 0,
            enable_gqa=grouped,
        )
        return out.transpose(1, 2)

    def _mask(self, start: int, end: int) -> Tensor:
        """(B, 1, end - start, end) bool: earlier tokens but padding; padding sees itself, lest it be 0 / 0."""
        queries = torch.arange(start, end, device=self.padding.device)[:, None]
        keys = torch.arange(end, device=self.padding.device)
        seen = (keys <= queries) & (keys >= self.padding[:, None, None])
        return (seen | (keys == queries))[:, None]
