"""Keys and values of the tokens a model has read, for generation."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class KvCache:
    """Keys and values of the tokens so far. Each call of the model appends the next ones.

    The first call has prompts of different lengths, padded on the left. The layers call in their order.
    """

    def __init__(
        self,
        num_layers: int,
        max_length: int,
        padding: Tensor,
        visible: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        """padding: (B,) integers, the padding at each row's start. visible: see model.attention.BACKENDS."""
        self.visible = visible
        self.length = 0
        """Tokens of a row so far, padding too"""
        self.padding, self._padded = padding, bool(padding.any())
        self._max_length, self._layer = max_length, 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._num_layers = num_layers
        self._mask: Tensor | None = None

    def positions(self, count: int) -> Tensor:
        """(B, count): positions of the next `count` tokens in their documents; 0 for padding."""
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
        if layer == 0:
            needed = self.visible is not None or self._padded or (start and end - start > 1)
            self._mask = self._attended(start, end) if needed else None
        mask = self._mask
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys[:, :, :end],
            values[:, :, :end],
            attn_mask=mask,
            is_causal=mask is None and start == 0,
            enable_gqa=grouped,
        )
        return out.transpose(1, 2)

    def _attended(self, start: int, end: int) -> Tensor:
        """(B, 1, end - start, end) bool: earlier tokens but padding. Padding attends to itself: no key at all gives NaN."""
        positions = torch.arange(end, device=self.padding.device) - self.padding[:, None]  # padding's are below 0
        queries, keys = positions[:, start:, None], positions[:, None]
        attended = (keys <= queries) & (keys >= 0)
        if self.visible is not None:
            attended = attended & self.visible(queries, keys)
        return (attended | (keys == queries))[:, None]
