"""From the host to the device without a wait."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor on the device. To a GPU it is an asynchronous copy from pinned memory: the host does not wait."""
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)
