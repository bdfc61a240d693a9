"""How much memory there is, and how much a model takes."""

import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from minillama.parallel.processes import all_reduce, local_world_size


def peak_memory_gib(device: torch.device | str) -> float:
    """The most memory this process has used: allocated on its CUDA device, or resident on the host."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows, where only CUDA is of use

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def parameter_bytes(model: nn.Module) -> tuple[int, int]:
    """(Bytes of the frozen parameters, bytes of those that train)."""
    size = {True: 0, False: 0}
    for parameter in model.parameters():
        size[parameter.requires_grad] += parameter.numel() * parameter.element_size()
    return size[False], size[True]


def least_memory(device: str) -> float:
    """Bytes that a process may use: its GPU's, or its share of the host's. The least of any rank, so that all ranks choose
    the same. Every rank must call it."""
    if device == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = host_memory() // local_world_size()
    return -all_reduce([-float(memory)], "max")[0]


def host_memory() -> int:
    """Bytes of memory of this machine, or the limit of the container that this process runs in."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # versions 2 and 1
        with suppress(OSError, ValueError):  # not there; "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)
