"""Which kind of device a tensor is computed on, where that decides how: sizes of pieces, dtypes of sums."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_estimated: list[str] = []


def device_kind(tensor: Tensor) -> str:
    """ "cpu" or "cuda": the tensor's own, or inside `estimated_on` the one that is estimated."""
    return _estimated[-1] if _estimated else tensor.device.type


@contextmanager
def estimated_on(kind: str) -> Iterator[None]:
    """What runs inside, on tensors without memory, goes the way it would go on a device of this kind."""
    _estimated.append(kind)
    try:
        yield
    finally:
        _estimated.pop()
