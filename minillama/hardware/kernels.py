"""Which kernels compute the model: the attention, and compiled blocks."""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minillama.errors import UserError
from minillama.hardware import benchmark
from minillama.model.attention import BACKENDS, AttentionContext, Blockwise
from minillama.model.llama import Llama

ATTENTION = "--kernels.attention"


@dataclass(frozen=True)
class KernelsConfig:
    """Which kernels compute the model."""

    attention: Literal["auto", "flash", "varlen", "flex", "sdpa", "math"] = "auto"
    """varlen: FlashAttention, all documents in one call (CUDA, bf16 or fp16). flex: FlexAttention (CUDA). sdpa:
    PyTorch's scaled_dot_product_attention, one call a document. flash: the same, and an error where FlashAttention cannot
    do it. math: matrix products with fp32 sums. auto: the best for device and precision, on a CPU the one that is measured
    to be faster; the summary says which."""
    compile: bool = False
    """Compile the blocks with torch.compile: the first steps take up to a minute more, later ones less memory. On a CPU they
    take about as long as without."""


def choose_kernels(
    model: Llama,
    config: KernelsConfig,
    dtype: torch.dtype,
    device: str,
    cache_dir: Path | None = None,
    saved: str | None = None,
) -> str:
    """Sets the attention that config asks for, to compute in dtype. Returns which, and why if there was a choice.

    cache_dir: where measurements are cached. saved: the attention of the checkpoint that a run resumes from, which
    "auto" keeps if it can run here. Every rank must call it. Raises UserError for what cannot run here.
    """
    name: str = config.attention
    flash = device == "cuda" and dtype != torch.float32 and torch.cuda.get_device_capability() >= (8, 0)
    why = ""
    if name == "auto":
        possible = {"math", "flex", "varlen"} if config.compile else set(BACKENDS)
        possible -= {"flex", "varlen"} if device == "cpu" else set() if flash else {"varlen", "flash"}
        if saved in possible:
            name, why = saved, "the checkpoint's"
        elif device == "cuda":
            name, why = _best_on_gpu(dtype, flash)
        else:
            name, why = _best_on_cpu(config, dtype, cache_dir)
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


def _best_on_gpu(dtype: torch.dtype, flash: bool) -> tuple[str, str]:
    if flash:
        return "varlen", "half precision on CUDA"
    capability = torch.cuda.get_device_capability()
    if capability >= (7, 0) and dtype != torch.bfloat16:  # what Triton compiles for; bf16 from 8.0 has varlen
        return "flex", f"{dtype} on CUDA".removeprefix("torch.")
    return "math", f"compute capability {capability[0]}.{capability[1]}"


def _best_on_cpu(config: KernelsConfig, dtype: torch.dtype, cache_dir: Path | None) -> tuple[str, str]:
    if config.compile:
        return "math", "compiled on CPU"
    rates = {name: attention_rate(name, dtype, cache_dir) for name in ("math", "sdpa")}
    best, other = sorted(rates, key=lambda name: rates[name], reverse=True)
    return best, f"{rates[best]:,.0f} tokens/s a core, {other} {rates[other]:,.0f}"


def attention_rate(name: str, dtype: torch.dtype, cache_dir: Path | None = None) -> float:
    """Tokens per second and core of an attention's forward and backward: measured once on a machine."""
    tokens, heads, kv_heads, head_dim = 512, 8, 2, 64

    @torch.inference_mode(False)
    @torch.enable_grad()  # also if the caller is in no_grad
    def measure() -> float:
        q, k, v = (torch.full((1, tokens, h, head_dim), 0.5, dtype=dtype) for h in (heads, kv_heads, kv_heads))
        context = BACKENDS[name]([tokens], q.device)

        def forward_and_backward() -> None:
            leaves = [x.requires_grad_() for x in (q, k, v)]
            torch.autograd.grad(context.attend(*leaves), leaves, torch.ones_like(q))

        return tokens / benchmark.fastest(forward_and_backward)

    return benchmark.remembered(f"attention-{name}-{dtype}".replace("torch.", ""), measure, cache_dir)


def compile_blocks(model: Llama) -> Llama:
    """Compiles what each block runs, inside FSDP's hooks and with its recomputation. Call it after `shard`.

    Blocks that are alike share one compilation, whatever the number of tokens and documents (with varlen and flex two: the
    second when the documents first differ). A block below the first that trains needs another one, and so do one row
    instead of several, and evaluation.
    """
    import torch._dynamo  # the import takes a second

    # It warns of in-place operations in a block that --fsdp.recompute selective recomputes: there are none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    torch._dynamo.config.recompile_limit = 64  # kinds of llama-adapter's blocks x kinds of batches
    for block in model.model.layers:
        block.forward = partial(_of_any_length, torch.compile(block.forward, fullgraph=True))
    return model


def _of_any_length(
    compiled: Callable[..., Tensor], x: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext
) -> Tensor:
    """Marks the sizes that differ from batch to batch as dynamic. (dynamic=True would make head_dim dynamic too; kernels
    that divide by it for each element are slower than eager ones.)"""
    for tensor in (x, *rope):
        torch._dynamo.maybe_mark_dynamic(tensor, (0, 1))
    if isinstance(context, Blockwise):
        torch._dynamo.maybe_mark_dynamic(context.cu_seqlens, 0)
    return compiled(x, rope, context)
