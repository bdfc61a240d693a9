"""What all contenders of tools/bench.py work on: a step's samples from its number, a parameter's values from its name."""

import math
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama
from minillama.model.quant import apply_quantization

RANK, ALPHA, PROMPT_LEN, LR, CLIP_NORM = 8, 32, 10, 1e-4, 1.0
SHORTEST, LONGEST = 50, 400
"""Tokens in a document of a pack: log-uniform, so half of them have less than 141."""

Job = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """The samples of one step, on the host."""

    tokens: Tensor
    """(B, T) int64"""
    positions: Tensor
    """(B, T) int64: restarts at 0 with each document"""
    labels: Tensor
    """(B, T) int64: the next token, -100 at the last of a document"""
    lengths: list[list[int]]
    """Of the documents of each row; they fill it"""

    @property
    def trained(self) -> int:
        return int((self.labels != -100).sum())

    @property
    def squares(self) -> int:
        return sum(length**2 for row in self.lengths for length in row)


def make_work(job: Job, step: int) -> Work:
    B, T = job["batch_size"], job["context_length"]
    tokens = torch.randint(job["config"]["vocab_size"], (B, T), generator=torch.Generator().manual_seed(step))
    draw = random.Random(step)
    rows: list[list[int]] = []
    for _ in range(B):
        row = [T] if job["documents"] == "none" else []
        while (room := T - sum(row)) > 0:
            row.append(min(room, round(math.exp(draw.uniform(math.log(SHORTEST), math.log(LONGEST))))))
        rows.append(row)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
    labels = tokens.roll(-1, dims=1)
    labels[positions.roll(-1, dims=1) == 0] = -100
    return Work(tokens, positions, labels, rows)


def parameter_value(name: str, like: Tensor, width: int) -> Tensor:
    """Ones for norms, else N(0, 1 / width), which keeps the scale of activations, drawn from the name alone.

    Adapters' B and gates too: if they were zero, as when training starts, a wrong adapter would not change the loss.
    """
    if "norm" in name:
        return torch.ones_like(like)
    drawn = torch.empty(like.numel(), device=like.device, dtype=torch.bfloat16)  # the same numbers for all precisions
    drawn.normal_(0, width**-0.5, generator=torch.Generator(like.device).manual_seed(zlib.crc32(name.encode())))
    return drawn.view(like.shape)


@torch.no_grad()
def fill(parameters: Iterable[tuple[str, Tensor]], width: int) -> None:
    for name, parameter in parameters:
        parameter.copy_(parameter_value(name, parameter, width))


def compute_dtype(job: Job) -> torch.dtype:
    return torch.float32 if job["precision"] == "fp32" else torch.bfloat16


def make_model(job: Job) -> Llama:
    """Our model, adapted, on the meta device: what the recipes build, and what FLOPs are counted on."""
    with torch.device("meta"):
        model = Llama(LlamaConfig(**job["config"]))
    if job["method"] != "full":
        model.requires_grad_(False)
    if (quantize := job.get("contender")) in ("nf4", "int8"):
        apply_quantization(model, quantize)
    if job["method"] == "lora":
        apply_lora(model, LoraConfig(RANK, ALPHA, 0.0, tuple(job["targets"])))
    elif job["method"] == "llama-adapter":
        apply_llama_adapter(model, LlamaAdapterConfig(PROMPT_LEN, 30))
    return model
