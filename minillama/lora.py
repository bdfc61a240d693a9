"""LoRA (https://arxiv.org/abs/2106.09685): a trained low-rank matrix beside each frozen one, as PEFT computes it."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama.errors import UserError
from minillama.surgery import replace_modules


@dataclass(frozen=True)
class LoraConfig:
    """What LoRA adds."""

    rank: int = 8
    """Rank r of the added matrices."""
    alpha: float = 32.0
    """The added product is scaled by alpha / rank."""
    dropout: float = 0.05
    """Dropout on the input of the added branch only."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the linear layers to adapt (q_proj k_proj v_proj o_proj gate_proj up_proj down_proj, or a longer end of
    a module's path), or all-linear: every one but the output head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (https://arxiv.org/abs/2312.03732): for high ranks."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"--lora.rank {self.rank}: must be at least 1")
        if not math.isfinite(self.alpha):
            raise UserError(f"--lora.alpha {self.alpha}: must be a number")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--lora.dropout {self.dropout}: must be at least 0 and below 1")
        if not self.targets:
            raise UserError("--lora.targets is empty: name at least one linear layer, or all-linear")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, as B must so that training starts from the base model."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class LoraLinear(nn.Module):
    """y = W x + scale * B A dropout(x). Keeps the names `weight` and `bias`, so base weights load unrenamed.

    A (rank, in) starts as U(-1/sqrt(in), 1/sqrt(in)) and B (out, rank) as 0, both fp32 whatever the base's dtype.
    The branch is computed in the adapters' dtype, the sum is cast to the base's.
    """

    def __init__(self, linear: nn.Linear, config: LoraConfig) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = linear.in_features, linear.out_features, config.scale
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.dropout = nn.Dropout(config.dropout)
        self.lora_A = nn.Linear(linear.in_features, config.rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = ZeroLinear(config.rank, linear.out_features, bias=False, device=device, dtype=torch.float32)

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]  # weight and bias; A and B are modules of their own

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        low = self.lora_A(self.dropout(x).to(self.lora_A.weight.dtype))
        return (y + self.lora_B(low * self.scale)).to(y.dtype)


def apply_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Adapts the targets of a model, best built on the meta device, before sharding. Freezes nothing.

    Raises UserError, naming it, for a target that matches no linear layer.
    """
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}

    def matches(name: str, target: str) -> bool:
        return name in linear and (target == "all-linear" or name == target or name.endswith("." + target))

    for target in config.targets:
        if target in ("lm_head", "embed_tokens"):
            raise UserError(f'--lora.targets: LoRA on "{target}" is not supported')
        if not any(matches(name, target) for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(
                f'--lora.targets: "{target}" matches no linear layer of the model; there are: {", ".join(known)}, or '
                "all-linear"
            )
    return replace_modules(
        model,
        lambda name, _: any(matches(name, target) for target in config.targets),
        lambda module: LoraLinear(module, config),  # type: ignore[arg-type]
    )


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Turns every LoraLinear of an unsharded model back into a linear layer with W + scale * B A, added in fp32."""

    def merged(module: nn.Module) -> nn.Linear:
        assert isinstance(module, LoraLinear)
        delta = module.lora_B.weight.float() @ module.lora_A.weight.float() * module.scale
        linear = nn.Linear(module.in_features, module.out_features, device="meta", bias=module.bias is not None)
        linear.weight = nn.Parameter((module.weight.float() + delta).to(module.weight.dtype), requires_grad=False)
        linear.bias = module.bias
        return linear

    return replace_modules(model, lambda _, module: isinstance(module, LoraLinear), merged)
