"""From the host to the device without a wait."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor on the device. A GPU copies it when it comes to it, from pinned memory: the host does not wait."""
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)
