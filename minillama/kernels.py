"""Which kernels compute the model: the attention, and compiled blocks."""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from minillama.attention import BACKENDS, Blockwise, Seen
from minillama.errors import UserError
from minillama.model import Llama

ATTENTION = "--kernels.attention"


@dataclass(frozen=True)
class KernelsConfig:
    """Which kernels compute the model."""

    attention: Literal["auto", "flash", "varlen", "flex", "sdpa", "math"] = "auto"
    """varlen: FlashAttention, all documents in one call (CUDA, bf16 or fp16). flex: FlexAttention (CUDA). sdpa:
    PyTorch's scaled_dot_product_attention, one call a document. flash: the same, and an error where FlashAttention cannot
    do it. math: matrix products with fp32 sums (the faster on CPUs that multiply bf16). auto: the best for device and
    precision; the summary says which."""
    compile: bool = False
    """Compile the blocks with torch.compile: the first steps take up to a minute more, later ones less memory. On a CPU they
    take about as long as without."""


def choose_kernels(model: Llama, config: KernelsConfig, dtype: torch.dtype, device: str) -> str:
    """Gives the model the attention that config asks for, to compute in dtype; says which, and why if it had the choice.

    Raises UserError for what cannot run here.
    """
    name: str = config.attention
    flash = device == "cuda" and dtype != torch.float32 and torch.cuda.get_device_capability() >= (8, 0)
    why = ""
    if name == "auto":
        name, why = _best(config, dtype, device, flash)
        why = f" (auto: {why})"
    if device == "cpu" and name in ("varlen", "flex"):
        raise UserError(f"{ATTENTION} {name} cannot train on a CPU: give auto, math, sdpa or flash")
    if device == "cuda" and name in ("varlen", "flash") and not flash:
        raise UserError(
            f"{ATTENTION} {name} needs bf16 or fp16, and a GPU of compute capability 8.0 or higher: give auto, flex, sdpa "
            "or math, or --fsdp.precision mixed"
        )
    if config.compile:
        if name in ("sdpa", "flash"):
            raise UserError(
                f"{ATTENTION} {name} has a call for each document, and no batch has those of another: with "
                "--kernels.compile give auto, varlen, flex or math"
            )
        if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "clang++")):
            raise UserError("--kernels.compile needs a C++ compiler: install g++, or name one in the variable CXX")
    model.attention = BACKENDS[name]
    return name + why


def _best(config: KernelsConfig, dtype: torch.dtype, device: str, flash: bool) -> tuple[str, str]:
    if flash:
        return "varlen", "half precision on CUDA"
    if device == "cuda":
        return "flex", f"{dtype} on CUDA".removeprefix("torch.")
    # With AMX, PyTorch's own kernel uses it.
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported():
        return "math", "bf16 on a CPU with AVX512-BF16"
    if config.compile:
        return "math", "compiled on CPU"
    return "sdpa", f"{dtype} on CPU".removeprefix("torch.")


def compile_blocks(model: Llama) -> Llama:
    """Compiles what each block runs: inside FSDP's hooks, and with its recomputation, so after `shard`.

    All blocks alike are one compilation, whatever the number of tokens and documents (with varlen and flex two: the
    second where the documents first differ): a block below the first that trains is another, and so is one row instead
    of several, or evaluation.
    """
    import torch._dynamo  # takes a second

    # It warns of operations in place in a block that --fsdp.recompute selective runs again: there are none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    torch._dynamo.config.recompile_limit = 64  # the kinds of llama-adapter's blocks, times those of batches
    for block in model.model.layers:
        block.forward = partial(_of_any_length, torch.compile(block.forward, fullgraph=True))
    return model


def _of_any_length(compiled: Callable[..., Tensor], x: Tensor, rope: tuple[Tensor, Tensor], seen: Seen) -> Tensor:
    """Tells the compiler which sizes differ from batch to batch. (dynamic=True would make head_dim unknown too, and
    kernels that divide by it for each number they touch: slower than no compilation.)"""
    for tensor in (x, *rope):
        torch._dynamo.maybe_mark_dynamic(tensor, (0, 1))
    if isinstance(seen, Blockwise):
        torch._dynamo.maybe_mark_dynamic(seen.bounds, 0)
    return compiled(x, rope, seen)
