"""What a recomputed block saves of its forward: --fsdp.recompute selective."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

from minillama.model.quant import shapes

MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
QUANTIZED = torch.ops.minillama.quantized_linear.default
ATTENTION = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "minillama::blockwise_attention",
    "torch_attn::_varlen_attn",
    "flex_attention",
)


def keep_some(block: nn.Module) -> Callable[[], tuple[Any, Any]]:
    """The context_fn of torch.utils.checkpoint.checkpoint that keeps the results of attention and of every other product
    with a base weight of the same shape: mostly v, o and up.

    It starts with the second of each shape: the block's last product is the only one of its shape, and nothing needs its
    result. An adapter's products have other shapes and do not count. They are small, or, as B's, cheap to compute for the
    memory that the result takes, so none is kept.
    """
    # as they enter a matrix product: (in, out)
    weights = {(shape[1], shape[0]) for name, shape in shapes(block).items() if name.endswith("_proj.weight")}
    return partial(_contexts, weights)


def _contexts(weights: set[tuple[int, int]]) -> tuple[Any, Any]:
    """The contexts of one call of the block: its forward, and its recomputation."""
    seen: Counter[tuple[bool, tuple[int, ...]]] = Counter()  # products so far, by shape, in each of the two

    def policy(ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op.name() in ATTENTION
        shape = None
        if op in MATMULS:
            shape = tuple(args[-1].shape)
        elif op is QUANTIZED:
            shape = args[0].shape[-1], len(args[1])
        if shape in weights:
            seen[ctx.is_recompute, shape] += 1
            keep = seen[ctx.is_recompute, shape] % 2 == 0
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
