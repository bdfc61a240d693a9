"""RMSNorm and SwiGLU: each in plain PyTorch, and as an autograd function for where PyTorch has no fused kernel.

`rms_norm` and `swiglu` choose: PyTorch's fused norm on CUDA, the plain form under torch.compile, else our function.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama.model.autograd import first_derivative_only


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps), in fp32 and rounded once (https://arxiv.org/abs/1910.07467).

    x (..., C) of any floating dtype, weight (C,) -> y like x.
    """
    plain = x.is_cuda or torch.compiler.is_compiling()
    return rms_norm_plain(x, weight, eps) if plain else _RMSNorm.apply(x, weight, eps)


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """On a CPU it takes half the time of PyTorch's, which makes several passes, and saves x instead of fp32 copies of it.

    With n = x / sqrt(mean(x^2) + eps) and h = weight * dy: dx = (h - n * mean(h * n)) / sqrt(...), dweight = sum(dy * n).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.float32, copy=True)
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return wide.mul_(scale).mul_(weight).to(x.dtype)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.to(torch.float32, copy=True).mul_(scale)
        wide = grad.to(torch.float32, copy=True)
        grad_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        wide.mul_(weight)
        wide.addcmul_(normed, (wide * normed).mean(-1, keepdim=True), value=-1).mul_(scale)
        return wide.to(x.dtype), grad_weight, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (https://arxiv.org/abs/2002.05202): two tensors of one shape and dtype -> one like them."""
    return swiglu_plain(gate, up) if torch.compiler.is_compiling() else _SwiGLU.apply(gate, up)


def swiglu_plain(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Recomputes silu(gate) in the backward: a third less to save of a block's widest tensors."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)
