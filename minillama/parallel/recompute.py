"""What a block that runs again in the backward keeps of its first run: --fsdp.recompute selective."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
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
    with a weight of the base, among those of one shape: mostly v, o and up.

    Of one shape it begins with the second, as nothing needs the result of the one that is alone, the block's last. An
    adapter's products do not count, so they change nothing: their shapes are others. They are small, or, with B, cost
    little for the memory that the result takes, so none is kept.
    """
    # as a matrix product takes them: (in, out)
    weights = {(p.shape[1], p.shape[0]) for name, p in block.named_parameters() if name.endswith("_proj.weight")}
    return partial(_contexts, weights)


def _contexts(weights: set[tuple[int, int]]) -> tuple[Any, Any]:
    """Those of one run of the block."""
    seen: Counter[tuple[bool, tuple[int, ...]]] = Counter()  # in the forward, and when it runs again

    def policy(ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op.name() in ATTENTION
        if op in MATMULS and (shape := tuple(args[-1].shape)) in weights:
            seen[ctx.is_recompute, shape] += 1
            keep = seen[ctx.is_recompute, shape] % 2 == 0
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
