"""A check of tools/gpu_check.py: a number that is measured, and how large it may be."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama.model.config import LlamaConfig
from minillama.parallel.processes import process_group


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    group: str
    """What --only names"""
    name: str
    measure: Callable[[], float | tuple[float, str]]
    """The error, or another number, and perhaps a remark"""
    tolerance: float | None = None
    """The largest error that passes; None: the number is only reported"""
    skip: str = ""
    """Why it cannot run here, if it cannot"""


class NotRun(Exception):
    """Why a check cannot run here, if that shows only when it begins."""


@dataclass
class Context:
    """What the checks run on."""

    device: str
    folder: Path
    """For what they write, and what one process leaves for several to compare"""
    stack: contextlib.ExitStack
    processes: int = 1
    joined: bool = field(default=False, init=False)

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def capability(self) -> tuple[int, int]:
        return torch.cuda.get_device_capability() if self.cuda else (0, 0)

    @property
    def model(self) -> LlamaConfig:
        """Small, of the shape's kind that kernels want on a GPU; tiny on a CPU."""
        if self.cuda:
            return LlamaConfig(2048, 256, 512, 4, 4, 2, rms_norm_eps=1e-5)
        return LlamaConfig(512, 64, 128, 2, 4, 2, rms_norm_eps=1e-5)

    def join(self) -> None:
        """Makes the process group, once: checks that need none run before."""
        if not self.joined:
            self.stack.enter_context(process_group("cuda" if self.cuda else "cpu", timeout_minutes=3))
            self.joined = True

    def no_half(self, dtype: torch.dtype) -> str:
        """Why this device does not compute in dtype, or nothing."""
        if self.cuda and dtype == torch.bfloat16 and self.capability < (8, 0):
            return f"bf16 needs compute capability 8.0, this is {'.'.join(map(str, self.capability))}"
        return ""


def run(check: Check) -> dict[str, Any]:
    """Runs a check; returns its row even if it fails."""
    row = {"group": check.group, "check": check.name, "tolerance": check.tolerance, "error": None}
    if check.skip:
        return row | {"result": "not run", "detail": check.skip, "seconds": 0.0}
    began = time.perf_counter()
    detail = ""
    try:
        found = check.measure()
        row["error"], detail = found if isinstance(found, tuple) else (found, "")
        passes = check.tolerance is None or row["error"] <= check.tolerance  # NaN never does
        result = "failed" if not passes else "measured" if check.tolerance is None else "passed"
        if not math.isfinite(row["error"]):  # JSON has neither NaN nor infinity
            row["error"], detail = None, f"{row['error']} {detail}".strip()
    except NotRun as reason:
        result, detail = "not run", str(reason)
    except Exception as error:
        result, detail = "failed", f"{type(error).__name__}: {str(error).strip() or 'without a message'}"
    return row | {"result": result, "detail": detail, "seconds": round(time.perf_counter() - began, 2)}


def is_fatal(row: dict[str, Any]) -> bool:
    """Whether the process can do no more on its GPU after this row."""
    return row["result"] == "failed" and ("CUDA error" in row["detail"] or "AcceleratorError" in row["detail"])


def distance(ours: Tensor, exact: Tensor) -> float:
    """|ours - exact| / |exact|, in float64; 0 where both are zero."""
    ours, exact = ours.detach().double(), exact.detach().double()
    apart, length = (ours - exact).norm().item(), exact.norm().item()
    return apart / length if length else (0.0 if apart == 0 else math.inf)


def worst(errors: dict[str, float]) -> tuple[float, str]:
    """The largest of several errors, or the first that is NaN, and whose it is."""
    name = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return errors[name], name


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
