"""Llama, with Hugging Face's parameter names and config fields, so that checkpoints load and save unrenamed.

Needs torch alone. Knows nothing of ranks, devices, adapters or flags: those act on a built model from outside.

Shapes: B batch, T tokens, C width (hidden_size), H query heads, K key-value heads, D head width, V vocabulary.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama.attention import BACKENDS, KvCache, Seen, document_lengths
from minillama.autograd import first_derivative_only
from minillama.errors import UserError
from minillama.loss import Targets, linear_cross_entropy, linear_log_probabilities

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LARGEST = 2**24
"""Of each size, so that no product of them overflows."""
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of config.json that decide what the model computes; defaults are those of transformers."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    """None: as many as query heads."""
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    """None, {"rope_type": "linear", "factor": f}, or Llama 3's {"rope_type": "llama3", "factor": f, ...}."""
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(
                    f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                    f"{self.num_attention_heads}, and the config gives no head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        assert self.num_key_value_heads and self.head_dim
        sizes = {name: getattr(self, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
        sizes["num_attention_heads * head_dim"] = self.num_attention_heads * self.head_dim
        if large := [f"{name} {size}" for name, size in sizes.items() if size > LARGEST]:
            raise UserError(f"{', '.join(large)}: no Llama is that large, {LARGEST} is the most that is built")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd: rotary embeddings need an even one")
        if self.hidden_act != "silu":
            raise UserError(f'hidden_act "{self.hidden_act}" is not supported: Llama uses "silu"')
        scaling = self.rope_scaling or {}
        kind = scaling.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3"):
            raise UserError(f'rope type "{kind}" is not supported: only "default", "linear" and "llama3" are')
        needs = {"default": (), "linear": ("factor",), "llama3": LLAMA3_ROPE}[kind]
        if missing := [key for key in needs if not isinstance(scaling.get(key), int | float)]:
            raise UserError(f'rope_scaling of type "{kind}" lacks the number {", ".join(missing)}')

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "LlamaConfig":
        """Reads the contents of a config.json, of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

        Raises UserError, naming the field, for what this model cannot compute.
        """
        architectures, model_type = config.get("architectures") or [], config.get("model_type", "llama")
        if not isinstance(architectures, list) or "LlamaForCausalLM" not in architectures or model_type != "llama":
            found = f"{json.dumps(architectures):.80}, model_type {json.dumps(model_type):.80}"
            raise UserError(
                f'the architecture is not supported: "architectures" must hold "LlamaForCausalLM", found {found}'
            )
        if config.get("quantization_config"):
            raise UserError('"quantization_config": quantized checkpoints are not supported, give the plain one')
        if missing := [key for key in REQUIRED if config.get(key) is None]:
            raise UserError(f"the model's config lacks {', '.join(missing)}")
        values = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        for field in fields(cls):
            kind = (get_args(field.type) or (field.type,))[0]
            value = values.get(field.name)
            if kind not in (int, float, bool, str) or value is None:
                continue
            kinds = (int, float) if kind is float else (kind,)
            if type(value) not in kinds or (kind in (int, float) and not 0 < value < 2**63):
                raise UserError(f"the model's config has {field.name} = {value!r}, where a {kind.__name__} belongs")
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # where both are: as transformers
        if not isinstance(rope, dict):
            raise UserError(f"the model's config has the RoPE settings {rope!r}, which are no object")
        rope = dict(rope)
        theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
        if type(theta) not in (int, float) or not 0 < theta < 2**63:
            raise UserError(f"the model's config has rope_theta = {theta!r:.80}, where a number belongs")
        values["rope_theta"] = float(theta)
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError("partial_rotary_factor is not supported: Llama rotates the whole head")
        if "type" in rope:  # the key's older name
            rope.setdefault("rope_type", rope.pop("type"))
        if rope.get("rope_type") == "llama3":  # it may stand beside, which then counts, or go without saying
            length = "original_max_position_embeddings"
            inside = rope.get(length, values.get("max_position_embeddings", cls.max_position_embeddings))
            rope[length] = inside if config.get(length) is None else config[length]
        if "factor" in rope and "rope_type" not in rope:
            raise UserError("rope_scaling has a factor but no rope_type")
        values["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        return cls(**values)


def rope_frequencies(config: LlamaConfig, device: torch.device | str | None = None) -> Tensor:
    """Angle per position of each rotated pair: (D / 2,) fp32, scaled as config.rope_scaling says.

    RoPE: https://arxiv.org/abs/2104.09864, section 3.2.2. Llama 3.1's scaling: wavelengths longer than
    original_length / low_freq_factor are slowed by `factor`, those shorter than original_length / high_freq_factor
    are kept, and between the two the mix is linear in the number of turns within the original length.
    """
    assert config.head_dim
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        return frequencies / scaling["factor"]
    if scaling.get("rope_type") == "llama3":
        factor, low, high, length = (scaling[key] for key in LLAMA3_ROPE)
        turns = length * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / factor
    return frequencies


def rope_table(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle: two (B, T, 1, D / 2) fp32.

    Made anew in each forward from (D / 2,) numbers, once for all layers: there is no buffer that a cast of the model
    could round (in bf16 the phase of position 1023 is already off by more than a radian) or that a meta device loses.
    """
    angles = positions.float()[..., None, None] * rope_frequencies(config, positions.device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the pairs (x[i], x[i + D / 2]) of x (B, T, heads, D) in fp32; the half-split layout of HF checkpoints."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """y = weight * x / sqrt(mean(x^2) + eps), in fp32 and rounded once (https://arxiv.org/abs/1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or torch.compiler.is_compiling():
            return super().forward(x)  # one kernel
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """Where PyTorch computes the norm step by step: half the time, and keeps x, not fp32 copies of it.

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
    """silu(gate) * up (https://arxiv.org/abs/2002.05202)."""
    return F.silu(gate) * up if torch.compiler.is_compiling() else _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """Computes silu(gate) again in the backward: a third less to keep of a block's widest tensors."""

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


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        assert config.head_dim and config.num_key_value_heads
        C, D, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.head_dim = D
        self.q_proj = nn.Linear(C, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.attention_bias)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, T, H, D), rotated keys and plain values (B, T, K, D) of x (B, T, C)."""
        heads = (-1, self.head_dim)
        q = rotate(self.q_proj(x).unflatten(-1, heads), rope)
        k = rotate(self.k_proj(x).unflatten(-1, heads), rope)
        return q, k, self.v_proj(x).unflatten(-1, heads)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], seen: Seen) -> Tensor:
        return self.o_proj(seen.attend(*self.project(x, rope)).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        C, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(C, hidden, bias=bias)
        self.up_proj = nn.Linear(C, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, C, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], seen: Seen) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """All but the head: what checkpoints call `model`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, rope: tuple[Tensor, Tensor], seen: Seen) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, rope, seen)
        return self.norm(x)


class Head(nn.Linear):
    """The output projection; given labels it returns the loss, or the log-probability of each label, so that the logits of
    a batch never exist at once."""

    def forward(self, x: Tensor, labels: Tensor | Targets | None = None, per_label: bool = False) -> Tensor:
        if labels is None:
            return F.linear(x, self.weight)
        return (linear_log_probabilities if per_label else linear_cross_entropy)(x, self.weight, labels)


class Llama(nn.Module):
    """A Llama language model. Built on torch.device("meta") it costs nothing until it is materialised."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.attention = BACKENDS["sdpa"]
        """Any of BACKENDS"""
        self.model = Trunk(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes head and embedding one parameter where the config says so (moving off meta makes them two again)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        labels: Tensor | Targets | None = None,
        per_label: bool = False,
        keep: Tensor | None = None,
        cache: KvCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of the token after each of tokens (B, T); or, with labels, their summed loss.

        positions: (B, T) place of each token in its document; by default 0 to T - 1 in every row.
        document_ids: (B, T) integers; a token attends to the earlier tokens of its row with the same id. A document's
            tokens stand side by side.
        lengths: instead, how long the documents are, row after row; each row ends with the end of one.
        labels: (B, T) the token to be predicted AT each position (already shifted), or -100 for none. The result is
            then the cross entropy summed over all labels, in nats, fp32 ().
        per_label: the result is instead the log-probability of each label, row after row: fp32 (N,).
        keep: (B, T) bool; the result is the logits of these places only, row after row: (N, V).
        cache: the tokens follow those of the calls before with it; the result is the last token's logits, (B, 1, V).

        On a GPU, to find documents and labels waits for it, twice; FSDP2 moves tensors of the host there first. With
        lengths, and labels made ready by `find_targets`, as `collate` makes both, nothing waits.
        Raises UserError for lengths that are not those of the rows.
        """
        if cache is not None:
            rope = rope_table(self.config, cache.positions(tokens.shape[1]))
            return self.lm_head(self.model(tokens, rope, cache)[:, -1:])
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        rows, length = tokens.shape
        if lengths is not None:
            _check_lengths(lengths, rows, length)
        else:
            lengths = [length] * rows if document_ids is None else document_lengths(document_ids)
        seen = self.attention(list(lengths), tokens.device)
        x = self.model(tokens, rope_table(self.config, positions), seen)
        if keep is not None:
            return self.lm_head(x[keep])
        return self.lm_head(x) if labels is None else self.lm_head(x, labels, per_label)


def _check_lengths(lengths: Sequence[int], rows: int, length: int) -> None:
    ends = list(accumulate(lengths))
    if ends[-1:] != [rows * length] or not set(ends).issuperset(range(length, rows * length, length)):
        raise UserError(
            f"lengths: those of documents that fill {rows} rows of {length} tokens, row after row, are needed"
        )
