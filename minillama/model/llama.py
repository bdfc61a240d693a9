"""Llama, with Hugging Face's parameter names and config fields, so that checkpoints load and save unrenamed.

Needs torch alone. Knows nothing of ranks, devices, adapters or flags: those act on a built model from outside.

Shapes: B batch, T tokens, C width (hidden_size), H query heads, K key-value heads, D head width, V vocabulary.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama.errors import UserError
from minillama.model.attention import BACKENDS, AttentionContext, document_lengths
from minillama.model.config import LlamaConfig
from minillama.model.elementwise import rms_norm, swiglu
from minillama.model.kv_cache import KvCache
from minillama.model.loss import Targets, linear_cross_entropy, linear_log_probabilities
from minillama.model.rope import rope_table, rotate


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext) -> Tensor:
        return self.o_proj(context.attend(*self.project(x, rope)).flatten(-2))


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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, context)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """The decoder without the LM head: what checkpoints call `model`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, rope, context)
        return self.norm(x)


class LMHead(nn.Linear):
    """The output projection. Given labels it returns the loss, or the log-probability of each label, so the logits of a
    batch never exist at once."""

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
        self.model = LlamaModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes head and embedding one parameter if the config says so. (Moving off meta makes them two again.)"""
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

        positions: (B, T) of each token in its document; by default 0 to T - 1 in every row.
        document_ids: (B, T) integers; a token attends to the earlier tokens of its row with the same id. A document's
            tokens are contiguous.
        lengths: instead, the lengths of the documents, row after row; the last document of a row ends with the row.
        labels: (B, T) the token to predict AT each position (already shifted), or -100 for none. The result is
            then the cross entropy summed over all labels, in nats, fp32 ().
        per_label: the result is instead the log-probability of each label, row after row: fp32 (N,).
        keep: (B, T) bool; the result is the logits of these positions only, row after row: (N, V).
        cache: the tokens follow those of earlier calls with this cache; the result is the last token's logits, (B, 1, V).

        On a GPU, finding documents and labels waits for it, twice (FSDP2 moves host tensors there first). With lengths,
        and labels from `find_targets`, nothing waits; `collate` makes both.
        Raises UserError for lengths that do not fill the rows.
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
        context = self.attention(list(lengths), tokens.device)
        x = self.model(tokens, rope_table(self.config, positions), context)
        if keep is not None:
            return self.lm_head(x[keep])
        if per_label:
            return self.lm_head(x, labels, per_label=True)
        return self.lm_head(x) if labels is None else self.lm_head(x, labels)


def _check_lengths(lengths: Sequence[int], rows: int, length: int) -> None:
    ends = list(accumulate(lengths))
    if ends[-1:] != [rows * length] or not set(ends).issuperset(range(length, rows * length, length)):
        raise UserError(
            f"lengths: those of documents that fill {rows} rows of {length} tokens, row after row, are needed"
        )
