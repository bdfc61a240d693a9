"""The model's sizes and settings: the fields of Hugging Face's config.json."""

import json
from dataclasses import dataclass, fields
from typing import Any, get_args

from minillama.errors import UserError

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LARGEST = 2**24
"""Limit of each size, so that no product of them overflows."""
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
        # as transformers, where a config has both
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
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
        if rope.get("rope_type") == "llama3":
            # A value outside rope_scaling has priority; without any it is max_position_embeddings.
            length = "original_max_position_embeddings"
            inside = rope.get(length, values.get("max_position_embeddings", cls.max_position_embeddings))
            rope[length] = inside if config.get(length) is None else config[length]
        if "factor" in rope and "rope_type" not in rope:
            raise UserError("rope_scaling has a factor but no rope_type")
        values["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        return cls(**values)
