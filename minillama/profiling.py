"""How much arithmetic a step is, and how fast this machine could do it."""

import time

import torch
from torch import nn

from minillama.model import Llama

MFU_FORMULA = (
    "FLOPs needed / seconds / (processes x measured matmul FLOP/s); needed: a token 4 a weight, 6 if it trains\n"
    "            (the head: trained tokens only), a row of L tokens 6 x heads x head_dim x L^2 a layer; a third of 6 below\n"
    "            the first block that trains; no recomputation"
)


def step_flops(model: Llama, tokens: int, trained: int, squares: int) -> float:
    """FLOPs that a step needs: see MFU_FORMULA.

    tokens: all but padding; trained: labels; squares: sum of the squared lengths of the documents. A frozen embedding
    costs nothing. Counts whole parameters, also of a sharded model.
    """
    config, trunk = model.config, model.model
    assert config.head_dim
    body = attention = 0
    backward = any(p.requires_grad for p in trunk.embed_tokens.parameters())  # whether gradients flow into the block
    for block in trunk.layers:
        backward = backward or any(parameter.requires_grad for parameter in block.parameters())
        for name, parameter in block.named_parameters():
            if parameter.ndim == 2 and "prompt" not in name:
                body += parameter.numel() * (6 if parameter.requires_grad else 4 if backward else 2)
        attention += (6 if backward else 2) * config.num_attention_heads * config.head_dim
    head = sum(p.numel() * (6 if p.requires_grad else 4) for p in model.lm_head.parameters())
    return float(body * tokens + head * trained + attention * squares)


def matmul_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of a few: what this process could reach at most."""
    n = 8192 if torch.device(device).type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 5 and sum(seconds) < 1:  # fp16 takes seconds on many CPUs
        start = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def peak_memory_gib(device: torch.device | str) -> float:
    """The most memory this process has used: allocated on its CUDA device, or resident on the host."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows, where only CUDA is of use

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters, whole ones also of a sharded model."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trains in counts if trains)
