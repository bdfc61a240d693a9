"""The precision a run computes in: what the hardware multiplies fast, unless a flag or a checkpoint says otherwise."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from minillama.formats.hf import base_parameters
from minillama.formats.meta import Weights
from minillama.hardware import benchmark
from minillama.hardware.benchmark import matmul_rate
from minillama.model.llama import Llama
from minillama.model.quant import quantized_layers
from minillama.parallel.memory import least_memory, parameter_bytes
from minillama.parallel.processes import all_reduce, warn
from minillama.parallel.sharding import DTYPES, STATE, FsdpConfig, Precision, set_dtypes

HALF = (torch.bfloat16, torch.float16)

SLOW = 3
"""Warn of a precision if another is so many times faster."""


def choose_precision(
    config: FsdpConfig,
    device: str,
    *,
    saved: Precision | None = None,
    flag: str = "--fsdp.precision",
    cache_dir: Path | None = None,
) -> tuple[FsdpConfig, str]:
    """config with precision "auto" resolved, and a text that names the precision, and why if there was a choice.

    saved: the precision of the checkpoint that a run resumes from, which "auto" keeps. flag: what asked for it, for
    messages. cache_dir: where measurements are cached. Warns of a precision that is slow on this hardware. Every rank
    must call it, and gets the same result.
    """
    if config.precision == "auto" and saved is None:
        name, why = _fastest_on_gpu() if device == "cuda" else _fastest_on_cpu(cache_dir)
        return replace(config, precision=name), f"{name} (auto: {why})"
    if config.precision == "auto":
        assert saved
        _warn_if_slow(saved, f"the checkpoint's precision {saved}", device, cache_dir)
        return replace(config, precision=saved), f"{saved} (auto: the checkpoint's)"
    _warn_if_slow(config.precision, f"{flag} {config.precision}", device, cache_dir)
    return config, config.precision


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """What "auto" computes in on this device: for from_pretrained(folder, device=device, dtype=fast_dtype(device))."""
    config, _ = choose_precision(FsdpConfig(), torch.device(device).type)
    return config.compute_dtype


def compact_base(model: Llama, weights: Weights, config: FsdpConfig, mesh: DeviceMesh) -> str:
    """Under fp32, keeps frozen weights in the half precision of their files if they would not fit otherwise.

    That is if a process's part of a sharded fp32 model takes more than half of its memory. FSDP then casts a block when it
    gathers it. A step takes 1 to 2 % longer and gives the same numbers, because the files have no more bits. Call it on the
    meta device, after set_dtypes, before sharding. Returns what to add to the text that names the precision.
    """
    if config.precision != "fp32" or config.strategy == "no-shard":
        return ""
    frozen, trained = parameter_bytes(model)
    if (frozen + STATE * trained) / mesh.size(-1) <= least_memory(mesh.device_type) / 2:
        return ""
    base = {name for name, parameter in base_parameters(model).items() if not parameter.requires_grad}
    base -= quantized_layers(model).keys()
    stored = {name: dtype for name in base & set(weights.names) if (dtype := weights.dtype(name)) in HALF}
    set_dtypes(model, config, stored)
    kept = ", ".join(sorted({str(dtype)[6:] for dtype in stored.values()}))
    return f"; the frozen base stays in {kept} and is cast a block at a time" if kept else ""


def _fastest_on_gpu() -> tuple[Precision, str]:
    bf16, fp16 = gpu_support()
    name = torch.cuda.get_device_name()
    if bf16:
        return "mixed", f"{name} multiplies bf16"
    return ("fp16", f"{name} multiplies fp16, not bf16") if fp16 else ("fp32", f"{name} has no fast bf16 or fp16")


def gpu_support() -> tuple[bool, bool]:
    """Whether the GPUs of all ranks multiply bf16 fast, and fp16: the least able one decides."""
    major, minor = torch.cuda.get_device_capability()
    capability = 100 if torch.version.hip else 10 * major + minor  # AMD's version numbers mean something else
    if dist.is_initialized():
        capability = -int(all_reduce([-float(capability)], "max")[0])
    return capability >= 80, capability >= 70


def _fastest_on_cpu(cache_dir: Path | None) -> tuple[Precision, str]:
    bf16, fp32 = (cpu_rate(dtype, cache_dir) for dtype in (torch.bfloat16, torch.float32))
    return "mixed" if bf16 > fp32 else "fp32", f"bf16 {_text(bf16)}, fp32 {_text(fp32)} GFLOP/s a core"


def cpu_rate(dtype: torch.dtype, cache_dir: Path | None = None) -> float:
    """FLOP/s of a linear layer's products on one core, of this run and all later ones on this machine."""
    measure = partial(benchmark.training_rate, dtype)
    return benchmark.remembered(f"matmul-{dtype}".replace("torch.", ""), measure, cache_dir)


def _warn_if_slow(name: Precision, what: str, device: str, cache_dir: Path | None) -> None:
    given = DTYPES[name]
    if device == "cuda":
        bf16, fp16 = gpu_support()
        if given == torch.bfloat16 and not bf16:
            return warn(
                f"{what}: {torch.cuda.get_device_name()} has no bf16 and emulates it slowly; auto takes another"
            )
        others = {torch.bfloat16: bf16, torch.float16: fp16}
        rates = {dtype: matmul_rate(device, dtype) for dtype in (given, *(d for d, there in others.items() if there))}
    else:
        rates = {dtype: cpu_rate(dtype, cache_dir) for dtype in (given, torch.bfloat16, torch.float32)}
    best = max(rates, key=lambda dtype: rates[dtype])
    if rates[best] > SLOW * rates[given]:
        where = "" if device == "cuda" else " a core"
        rate, fast = _text(rates[given]), _text(rates[best])
        warn(
            f"{what} computes in {str(given)[6:]}, at {rate} GFLOP/s{where} here; {str(best)[6:]} has {fast}: "
            f"{rates[best] / rates[given]:.0f} times as fast"
        )


def _text(rate: float) -> str:
    return f"{rate / 1e9:.3g}"
