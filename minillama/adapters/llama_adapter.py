"""llama-adapter (https://arxiv.org/abs/2303.16199): a trained prompt, added to attention through a gate that starts at zero.

As PEFT's AdaptionPrompt computes it: one gate a layer, without tanh.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama.errors import UserError
from minillama.model.attention import AttentionContext
from minillama.model.config import LARGEST
from minillama.model.llama import Attention
from minillama.model.surgery import M, replace_modules


@dataclass(frozen=True)
class LlamaAdapterConfig:
    """What llama-adapter adds."""

    prompt_len: int = 10
    """Length of the trained prompt in each adapted layer."""
    layers: int = 30
    """The top layers to adapt; at most the model's own count."""

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_len <= LARGEST:
            raise UserError(f"--adapter.prompt-len {self.prompt_len}: must be at least 1, and at most {LARGEST}")
        if self.layers < 1:
            raise UserError(f"--adapter.layers {self.layers}: must be at least 1")


class PromptedAttention(Attention):
    """Attention plus gate * softmax(q K^T / sqrt(D)) V, where K = k_proj(prompt), without RoPE, and V = v_proj(prompt).

    Keeps the projections' names, so base weights load unrenamed. `adaption_prompt` (prompt_len, C) starts as N(0, 1)
    and `adaption_gate` (1,) as 0, both fp32 whatever the base's dtype. PEFT holds the prompt as (1, prompt_len, C).
    FSDP2 shards the first dimension, so all of that would be on the first rank.
    """

    def __init__(self, attention: Attention, prompt_len: int) -> None:
        nn.Module.__init__(self)  # Attention's would make new projections
        self.head_dim = attention.head_dim
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        width, device = self.q_proj.in_features, self.q_proj.weight.device
        self.adaption_prompt = nn.Parameter(torch.empty(prompt_len, width, device=device, dtype=torch.float32))
        self.adaption_gate = nn.Parameter(torch.empty(1, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.adaption_prompt)
        nn.init.zeros_(self.adaption_gate)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext) -> Tensor:
        q, k, v = self.project(x, rope)
        attended = context.attend(q, k, v)
        prompt = self.adaption_prompt.to(x.dtype)
        k, v = (proj(prompt).unflatten(-1, (-1, self.head_dim)) for proj in (self.k_proj, self.v_proj))  # (len, K, D)
        # Every token attends to the whole prompt, whatever its document: one row of B * T queries, without a mask.
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q.flatten(0, 1), k, v))
        prompted = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        prompted = prompted[0].transpose(0, 1).view_as(attended)
        y = self.o_proj((attended + self.adaption_gate * prompted).to(x.dtype).flatten(-2))
        # As PEFT: o_proj is applied to both parts, so its bias, if there is one, is added twice.
        return y if self.o_proj.bias is None else y + self.o_proj.bias


def apply_llama_adapter(model: M, config: LlamaAdapterConfig) -> M:
    """Adapts the top layers of a model, best built on the meta device, before sharding. Freezes nothing.

    Composes with apply_lora in either order. Raises UserError for a model that has a llama-adapter already, and for one
    whose heads do not add up to hidden_size: PEFT's format does not support that.
    """
    attentions = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    for module in attentions.values():
        if isinstance(module, PromptedAttention):
            raise UserError("the model has a llama-adapter already: apply it once, to the base model")
        if (width := module.q_proj.out_features) != module.q_proj.in_features:
            raise UserError(
                f"llama-adapter needs heads that add up to hidden_size: here num_attention_heads * head_dim = {width}, "
                f"hidden_size = {module.q_proj.in_features}"
            )
    top = list(attentions)[-config.layers :]
    return replace_modules(
        model,
        lambda name, _: name in top,
        lambda module: PromptedAttention(module, config.prompt_len),  # type: ignore[arg-type]
    )
