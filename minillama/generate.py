"""Text from a model, token by token."""

from collections.abc import Collection

import torch
from torch import nn

from minillama.errors import UserError


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> list[int]:
    """The tokens that follow the prompt `tokens`, without it and without the stop token that ended them.

    temperature 0 takes the likeliest token, above 0 samples from softmax(logits / temperature). Each token runs the
    whole sequence through the model again: fit for looking at a few answers, not for serving.
    """
    if not tokens:
        raise UserError("generate needs a prompt of at least one token")
    device = next(model.parameters()).device
    random = torch.Generator(device).manual_seed(seed)
    sequence = torch.tensor([tokens], device=device)
    for _ in range(max_new_tokens):
        logits = model(sequence)[0, -1].float()
        if temperature == 0:
            token = logits.argmax()
        else:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)[0]
        if int(token) in stop_ids:
            break
        sequence = torch.cat((sequence, token[None, None]), dim=1)
    return sequence[0, len(tokens) :].tolist()
