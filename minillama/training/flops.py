"""How many floating-point operations (FLOPs) a step needs, and how many it executes."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from minillama.model.llama import Llama
from minillama.model.quant import shapes


def step_flops(model: Llama, tokens: int, trained: int, squares: int) -> float:
    """FLOPs that a step needs: 4 a token and weight, 6 if the weight trains (the head: trained tokens only), and
    6 x heads x head_dim x L^2 a layer for a document of L tokens. Below the first block that trains there is no backward:
    2 a token and weight, and a third of the 6. Recomputation does not count.

    tokens: all but padding; trained: labels; squares: sum of the squared lengths of the documents. A frozen embedding
    costs nothing. Counts whole parameters, also of a sharded model.
    """
    config, decoder = model.config, model.model
    assert config.head_dim
    body = attention = 0
    backward = any(p.requires_grad for p in decoder.embed_tokens.parameters())  # whether gradients flow into the block
    for block in decoder.layers:
        backward = backward or any(parameter.requires_grad for parameter in block.parameters())
        whole = shapes(block)
        for name, parameter in block.named_parameters():
            if parameter.ndim == 2 and "prompt" not in name:
                body += whole[name].numel() * (6 if parameter.requires_grad else 4 if backward else 2)
        attention += (6 if backward else 2) * config.num_attention_heads * config.head_dim
    head = sum(p.numel() * (6 if p.requires_grad else 4) for p in model.lm_head.parameters())
    return float(body * tokens + head * trained + attention * squares)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters, whole ones also of a sharded model."""
    whole = shapes(model)
    counts = [(whole[name].numel(), parameter.requires_grad) for name, parameter in model.named_parameters()]
    return sum(n for n, _ in counts), sum(n for n, trains in counts if trains)


def _attention_forward(q: torch.Size, k: torch.Size, *_: Any, **__: Any) -> int:
    batch, heads, queries, width = q
    return 4 * batch * heads * queries * k[2] * width  # q k^T and its softmax times v


def _attention_backward(_: torch.Size, q: torch.Size, k: torch.Size, *__: Any, **___: Any) -> int:
    return _attention_forward(q, k) * 5 // 2  # the scores again, and the gradients of them, of q, of k and of v


def _blockwise(*tensors: Tensor, out_val: Any = None) -> int:
    """Forward of (q, k, v, cu_seqlens), or backward of (gradient, q, k, v, cu_seqlens); see blockwise.py."""
    *_, heads, width = tensors[0].shape
    forward = 4 * heads * width * int(tensors[-1].diff().square().sum())
    return forward if len(tensors) == 4 else forward * 5 // 2


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *_: Any, **__: Any) -> int:
    return _blockwise(q, k, v, cu_seqlens.long())


def _varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *more: Any, **_: Any
) -> int:
    return _blockwise(grad, q, k, v, more[0].long())


for _formula in (_blockwise, _varlen, _varlen_backward):  # of tensors, not of shapes: the documents decide
    _formula._get_raw = True  # type: ignore[union-attr]


class FlopCounter:
    """Counts the FLOPs of this process, forward and backward, in all matrix products and attention, while entered.

    Attention counts as whole squares of scores, causal or not. FlopCounterMode alone does not know attention on the CPU
    and, before PyTorch 2.13, neither grouped query heads nor varlen. Compiled FlexAttention is not counted.
    """

    def __init__(self) -> None:
        import_module("torch.nn.attention.varlen")  # makes its operators
        from torch.utils.flop_counter import FlopCounterMode  # imports triton if it is installed, which takes a while

        aten = torch.ops.aten
        kernels = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
        names = [f"_scaled_dot_product_{kernel}" for kernel in kernels]
        formulas: dict[Any, Callable[..., int]] = {getattr(aten, name): _attention_forward for name in names}
        formulas |= {getattr(aten, f"{name}_backward"): _attention_backward for name in names}
        own = torch.ops.minillama
        formulas |= {own.blockwise_attention: _blockwise, own.blockwise_attention_backward: _blockwise}
        varlen = torch.ops.torch_attn
        formulas |= {varlen._varlen_attn: _varlen, varlen._varlen_attn_backward: _varlen_backward}
        self.mode = FlopCounterMode(display=False, custom_mapping=formulas)

    def __enter__(self) -> "FlopCounter":
        self.mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)
        counts = self.mode.get_flop_counts().get("Global", {})
        self.in_attention = sum(count for kernel, count in counts.items() if "att" in str(kernel))
        self.in_products = sum(counts.values()) - self.in_attention
