"""Text from a model, token by token."""

import math
from collections.abc import Collection, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from minillama.errors import UserError
from minillama.model.attention import BACKENDS
from minillama.model.kv_cache import KvCache
from minillama.model.llama import Llama


def generate(
    model: Llama,
    tokens: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> list[int]:
    """The tokens that follow the prompt `tokens`, without it and without the stop token that ended them.

    Settings as in `stream`, which takes several prompts at once.
    """
    batch = stream(
        model,
        [tokens],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_ids=stop_ids,
    )
    return [token for [token] in batch if token is not None]


@torch.no_grad()
def stream(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """The next token of each of B prompts, until all have ended: None for those that have.

    temperature 0 takes the likeliest token. Above 0 it samples from softmax(logits / temperature), of which only the
    top_k likeliest tokens are left (0: all), and of these the likeliest that together make up top_p of the probability
    (nucleus sampling, https://arxiv.org/abs/1904.09751): the one that reaches it is the last. On a sharded model every
    rank must ask for the same. Raises UserError for an empty prompt, impossible settings, and a model whose attention is
    neither one of BACKENDS nor has `visible`.
    """
    if not prompts or not all(prompts):
        raise UserError("generate needs prompts of at least one token")
    check_settings(temperature, top_k, top_p)
    device = next(model.parameters()).device
    random = torch.Generator(device).manual_seed(seed)
    width = max(map(len, prompts))
    rows = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    visible = getattr(model.attention, "visible", None)
    if visible is None and not any(model.attention is known for known in BACKENDS.values()):
        name = getattr(model.attention, "__name__", type(model.attention).__name__)
        raise UserError(
            f"model.attention {name} has no function visible(queries, keys): generate does not know which earlier tokens "
            "it attends to"
        )
    cache = KvCache(model.config.num_hidden_layers, width + max_new_tokens, padding, visible)
    tokens, ended = torch.tensor(rows, device=device), [False] * len(prompts)
    for _ in range(max_new_tokens):
        logits = model(tokens, cache=cache)[:, -1].float()
        tokens = _choose(logits, temperature, top_k, top_p, random)
        if isinstance(model, FSDPModule):  # consistent across ranks: else one would stop while the others wait
            dist.broadcast(tokens, src=0)
        found = tokens[:, 0].tolist()
        ended = [done or token in stop_ids for done, token in zip(ended, found, strict=True)]
        if all(ended):
            return
        yield [None if done else token for done, token in zip(ended, found, strict=True)]


def check_settings(temperature: float, top_k: int, top_p: float) -> None:
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature {temperature}: must be a number, at least 0")
    if top_k < 0:
        raise UserError(f"--top-k {top_k}: must be at least 0")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p}: must be above 0 and at most 1")


def _choose(logits: Tensor, temperature: float, top_k: int, top_p: float, random: torch.Generator) -> Tensor:
    """(B, 1) tokens from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities = (logits / temperature).softmax(-1)
    if top_k == 0 and top_p == 1:
        return torch.multinomial(probabilities, 1, generator=random)
    likely, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k:
        likely[:, top_k:] = 0
        likely /= likely.sum(-1, keepdim=True)
    before = likely.cumsum(-1) - likely
    likely[before >= top_p] = 0
    return order.gather(-1, torch.multinomial(likely, 1, generator=random))
