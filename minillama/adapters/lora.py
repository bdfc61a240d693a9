"""LoRA (https://arxiv.org/abs/2106.09685) and DoRA (https://arxiv.org/abs/2402.09353), as PEFT computes them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama.errors import UserError
from minillama.model.config import LARGEST
from minillama.model.llama import Llama, LMHead
from minillama.model.loss import Targets, linear_cross_entropy, linear_log_probabilities
from minillama.model.quant import Quantized, QuantizedLinear
from minillama.model.surgery import replace_modules
from minillama.parallel.processes import warn


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
    """Names of the layers to adapt (q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head embed_tokens, or a
    longer end of a module's path), or all-linear: every linear one but the output head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (https://arxiv.org/abs/2312.03732): for high ranks."""
    dora: bool = False
    """Train the length of each row of W + scale * B A on its own (DoRA, https://arxiv.org/abs/2402.09353). Slower, and
    with dropout the base's product is computed twice."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Layers with another rank, by their full name in the model: PEFT's rank_pattern."""
    alphas: dict[str, float] = field(default_factory=dict)
    """Layers with another alpha: PEFT's alpha_pattern."""

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.ranks.values()):
            if not 1 <= rank <= LARGEST:
                raise UserError(f"--lora.rank {rank}: must be at least 1, and at most {LARGEST}")
        for alpha in (self.alpha, *self.alphas.values()):
            if not math.isfinite(alpha):
                raise UserError(f"--lora.alpha {alpha}: must be a number")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--lora.dropout {self.dropout}: must be at least 0 and below 1")
        if not self.targets:
            raise UserError("--lora.targets is empty: name at least one layer, or all-linear")
        for target in self.targets:
            if self.dora and target.endswith(("lm_head", "embed_tokens")):
                raise UserError(
                    f"--lora.dora with {target} among --lora.targets is not supported: leave one of them out"
                )

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def of(self, layer: str) -> Self:
        """The config of one layer, by its name in the model: with its own rank and alpha."""
        rank, alpha = self.ranks.get(layer, self.rank), self.alphas.get(layer, self.alpha)
        return replace(self, rank=rank, alpha=alpha, ranks={}, alphas={})


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero: with such a B, training starts from the base model."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class LoraLinear(nn.Module):
    """y = W x + scale * B A dropout(x). Keeps the names `weight` and `bias`, so base weights load unrenamed.

    A (rank, in) starts as U(-1/sqrt(in), 1/sqrt(in)) and B (out, rank) as 0, both fp32 whatever the base's dtype.
    The branch is computed in the adapters' dtype, the sum is cast to the base's.

    DoRA: y = W x + (g - 1) * W dropout(x) + g * scale * B A dropout(x), with the gain g = m / |W + scale * B A| a row
    (its equation 5), whose denominator passes no gradient (section 4.3). We train m - |W| (out,), from 0: unlike m, it
    needs no base weights to start from, and is as exact in bf16 as B is.
    """

    lora_magnitude_change: nn.Parameter | None
    enabled = True
    """False: the base layer alone"""

    def __init__(self, linear: nn.Linear, config: LoraConfig) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = linear.in_features, linear.out_features, config.scale
        self.weight, self.bias = linear.weight, linear.bias
        fresh: dict[str, Any] = {"device": linear.weight.device, "dtype": torch.float32}
        self.dropout = nn.Dropout(config.dropout)
        self.lora_A = nn.Linear(linear.in_features, config.rank, bias=False, **fresh)
        self.lora_B = ZeroLinear(config.rank, linear.out_features, bias=False, **fresh)
        self._gain: Tensor | None = None
        change = nn.Parameter(torch.zeros(linear.out_features, **fresh)) if config.dora else None
        self.register_parameter("lora_magnitude_change", change)

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]  # weight and bias; A and B are modules of their own
        if self.lora_magnitude_change is not None:
            nn.init.zeros_(self.lora_magnitude_change)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x, self.bias)
        if not self.enabled:
            return y
        dropped = self.dropout(x)
        low = self.lora_A(dropped.to(self.lora_A.weight.dtype))
        branch = self.lora_B(low * self.scale)
        if self.lora_magnitude_change is not None:
            gain = self.gain(self.lora_magnitude_change)
            base = y if self.bias is None else y - self.bias
            if self.training and self.dropout.p:
                base = self.product(dropped)
            branch = (gain - 1).to(branch.dtype) * base + gain.to(branch.dtype) * branch
        return (y + branch).to(y.dtype)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + bias"""
        return F.linear(x, self.weight, bias)

    def base_weight(self) -> Tensor:
        return self.weight

    def gain(self, change: Tensor) -> Tensor:
        """DoRA's m / |W + scale * B A|: fp32 (out,). Cached while nothing trains, because it costs more than a token."""
        keep = not self.training and not torch.is_grad_enabled()
        if keep and self._gain is not None:
            return self._gain
        with torch.no_grad():
            weight = self.base_weight()
            length = row_norms(weight)
            adapted = row_norms(add_product(weight, self.lora_A.weight, self.lora_B.weight, self.scale))
        gain = (length + change.float()) / adapted
        self._gain = gain if keep else None
        return gain

    def train(self, mode: bool = True) -> Self:
        self._gain = None
        return super().train(mode)

    def merged(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, device="meta", bias=self.bias is not None)
        linear.weight = self.merged_weight()
        linear.bias = self.bias
        return linear

    def merged_weight(self) -> nn.Parameter:
        change = self.lora_magnitude_change
        merged = merge(self.base_weight(), self.lora_A.weight, self.lora_B.weight, self.scale, change=change)
        return nn.Parameter(merged.to(self.base_dtype), requires_grad=False)

    @property
    def base_dtype(self) -> torch.dtype:
        return self.weight.dtype


class QuantizedLoraLinear(Quantized, LoraLinear):  # type: ignore[misc]  # which has its weight as a Tensor
    """LoRA on a quantised layer: W is what it dequantises to."""

    def __init__(self, linear: QuantizedLinear, config: LoraConfig) -> None:
        LoraLinear.__init__(self, linear, config)
        self.hold(linear.kind, linear.dtype, linear.weight, linear.tables)

    def reset_parameters(self) -> None:
        Quantized.reset_parameters(self)
        if self.lora_magnitude_change is not None:
            nn.init.zeros_(self.lora_magnitude_change)

    @property
    def base_dtype(self) -> torch.dtype:
        return self.dtype


class LoraHead(LoraLinear):
    """The output head with LoRA; given labels it returns what LMHead does."""

    def forward(self, x: Tensor, labels: Tensor | Targets | None = None, per_label: bool = False) -> Tensor:
        if labels is None:
            return super().forward(x)
        low = up = None
        if self.enabled:
            low = self.lora_A(self.dropout(x).to(self.lora_A.weight.dtype))
            up = self.lora_B.weight * self.scale
        return (linear_log_probabilities if per_label else linear_cross_entropy)(x, self.weight, labels, low, up)

    def merged(self) -> nn.Linear:
        head = LMHead(self.in_features, self.out_features, device="meta", bias=False)
        head.weight = self.merged_weight()
        return head


class LoraEmbedding(nn.Module):
    """y = E[token] + scale * B A[:, token], without dropout. Keeps the name `weight`.

    A (rank, V) starts as 0 and B (C, rank) as N(0, 1), both fp32.
    """

    enabled = True
    """False: the base layer alone"""

    def __init__(self, embedding: nn.Embedding, config: LoraConfig) -> None:
        super().__init__()
        self.weight, self.scale = embedding.weight, config.scale
        fresh: dict[str, Any] = {"device": embedding.weight.device, "dtype": torch.float32}
        self.lora_embedding_A = nn.Parameter(torch.zeros(config.rank, embedding.num_embeddings, **fresh))
        self.lora_embedding_B = nn.Parameter(torch.randn(embedding.embedding_dim, config.rank, **fresh))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B)

    def forward(self, tokens: Tensor) -> Tensor:
        y = F.embedding(tokens, self.weight)
        if not self.enabled:
            return y
        # in fp32: the gradient of a column is a sum over all positions of its token
        low = F.embedding(tokens, self.lora_embedding_A.T.float())
        branch = low.to(self.lora_embedding_B.dtype) @ self.lora_embedding_B.T
        return (y + branch * self.scale).to(y.dtype)

    def merged(self) -> nn.Embedding:
        merged = merge(self.weight, self.lora_embedding_B.T, self.lora_embedding_A.T, self.scale)
        return nn.Embedding.from_pretrained(merged.to(self.weight.dtype))


def row_norms(weight: Tensor) -> Tensor:
    """The Euclidean length of each row: fp32 (rows,)."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


def add_product(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight + scale * b a, in fp32: (out, in) + (out, rank) (rank, in)."""
    return weight.to(torch.float32, copy=True).addmm_(b.float(), a.float(), alpha=scale)


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float, *, change: Tensor | None = None) -> Tensor:
    """W + scale * B A in fp32; with DoRA each row is scaled to length m. weight: all rows, or some, with those of b.

    change: DoRA's m - |W|, (out,).
    """
    merged = add_product(weight, a, b, scale)
    if change is None:
        return merged
    return merged.mul_(((row_norms(weight) + change.float()) / row_norms(merged))[:, None])


def apply_lora(model: Llama, config: LoraConfig) -> Llama:
    """Adapts the targets of a model, best built on the meta device, before sharding. Freezes nothing.

    Raises UserError, naming it, for a target that matches no layer, and for a model that has a LoRA already.
    """
    if any(isinstance(module, LoraLinear | LoraEmbedding) for module in model.modules()):
        raise UserError("the model has a LoRA already: apply it once, with all --lora.targets, or merge_lora before")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    names: dict[nn.Module, str] = {module: name for name, module in layers.items()}

    def matches(name: str, target: str) -> bool:
        if target == "all-linear":
            return isinstance(layers.get(name), nn.Linear) and name != "lm_head"
        return name in layers and (name == target or name.endswith("." + target))

    for target in config.targets:
        if not any(matches(name, target) for name in layers):
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise UserError(
                f'--lora.targets: "{target}" matches no layer of the model; there are: {", ".join(known)}, or all-linear'
            )

    def adapted(module: nn.Module) -> nn.Module:
        own = config.of(names[module])
        if isinstance(module, nn.Embedding):
            return LoraEmbedding(module, own)
        if isinstance(module, QuantizedLinear):
            return QuantizedLoraLinear(module, own)
        assert isinstance(module, nn.Linear)
        return (LoraHead if isinstance(module, LMHead) else LoraLinear)(module, own)

    replace_modules(model, lambda name, _: any(matches(name, target) for target in config.targets), adapted)
    made = [module for module in model.modules() if isinstance(module, LoraLinear | LoraEmbedding)]
    added = sum(p.numel() for module in made for name, p in module.named_parameters() if name.startswith("lora_"))
    # a quantised weight's own size is in bytes
    sizes = (m.in_features * m.out_features if isinstance(m, LoraLinear) else m.weight.numel() for m in made)
    if added > (whole := sum(sizes)):
        warn(
            f"LoRA of rank {config.rank} trains {added:,} numbers, and its layers themselves have {whole:,}: give less"
        )
    return model


def lora_plus(model: nn.Module, ratio: float) -> dict[Tensor, float]:
    """LoRA+ (https://arxiv.org/abs/2402.12354): the factor of the learning rate of each B of the linear layers."""
    layers = (module for module in model.modules() if isinstance(module, LoraLinear))
    return {layer.lora_B.weight: ratio for layer in layers} if ratio != 1 else {}


@contextmanager
def lora_off(model: nn.Module) -> Iterator[None]:
    """The model as it would be without its LoRA."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear | LoraEmbedding)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


@torch.no_grad()
def merge_lora(model: Llama) -> Llama:
    """Turns every adapted layer of an unsharded model back into a plain one with W + scale * B A, added in fp32.

    With DoRA each row has the length it learned. If one of a tied head and embedding was adapted, they are no longer tied.
    """
    ends = [isinstance(module, LoraHead | LoraEmbedding) for module in (model.lm_head, model.model.embed_tokens)]
    if any(ends) and model.config.tie_word_embeddings:
        model.config = replace(model.config, tie_word_embeddings=False)
    return replace_modules(
        model,
        lambda _, module: isinstance(module, LoraLinear | LoraEmbedding),
        lambda module: module.merged(),  # type: ignore[operator]
    )
