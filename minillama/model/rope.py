"""Rotary position embeddings."""

import math

import torch
from torch import Tensor

from minillama.model.config import LLAMA3_ROPE, LlamaConfig


def rope_frequencies(config: LlamaConfig, device: torch.device | str | None = None) -> Tensor:
    """Angle per position of each rotated pair: (D / 2,) fp32, scaled as config.rope_scaling says.

    RoPE: https://arxiv.org/abs/2104.09864, section 3.2.2. Llama 3.1's scaling: wavelengths longer than
    original_length / low_freq_factor are slowed by `factor`, those shorter than original_length / high_freq_factor
    are kept, and between the two the mix is linear in the number of turns within the original length.
    """
    assert config.head_dim
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        return frequencies / scaling["factor"]
    if scaling.get("rope_type") == "llama3":
        factor, low, high, length = (scaling[key] for key in LLAMA3_ROPE)
        turns = length * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / factor
    return frequencies


def rope_table(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle: two (B, T, 1, D / 2) fp32.

    Computed from scratch in each forward from (D / 2,) numbers, once for all layers. So there is no buffer that a cast of
    the model could round (in bf16 the phase of position 1023 is off by more than a radian) or that a meta device loses.
    """
    angles = positions.float()[..., None, None] * rope_frequencies(config, positions.device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the pairs (x[i], x[i + D / 2]) of x (B, T, heads, D) in fp32; the half-split layout of HF checkpoints."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
