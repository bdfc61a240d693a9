import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from torch import nn

from minillama import replace_modules
from minillama.errors import UserError


class Scaled(nn.Module):
    """(IA)^3 in a few lines, as a fork would write it: keeps the name `weight`, adds one vector."""

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight
        self.scale = nn.Parameter(torch.ones(linear.out_features))

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02)
        nn.init.ones_(self.scale)

    def forward(self, x):
        return F.linear(x, self.weight) * self.scale


def test_a_new_adapter_starts_as_the_base_and_trains():
    model = random_model().requires_grad_(False)
    tokens = torch.randint(0, 512, (1, 10))
    before = model(tokens)
    replace_modules(model, lambda name, _: name.endswith(("k_proj", "v_proj", "up_proj")), Scaled)
    after = model(tokens)
    assert torch.equal(before, after)
    after.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 9 and all(name.endswith(".scale") for name in trained)


def test_nothing_matched_is_an_error():
    with pytest.raises(UserError, match="no module of Llama matched"):
        replace_modules(random_model(), lambda name, _: name == "x", lambda module: module)
