"""Direct preference optimization: its losses against their formulas in float64."""

import math

import pytest
import torch

from minillama.dpo import DpoConfig, answer_sums, preference_losses
from minillama.errors import UserError


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


FORMULAS = {
    "sigmoid": lambda h, beta, e: -(1 - e) * math.log(sigmoid(beta * h)) - e * math.log(sigmoid(-beta * h)),
    "hinge": lambda h, beta, e: max(0.0, 1 - beta * h),
    "ipo": lambda h, beta, e: (h - 1 / (2 * beta)) ** 2,
}


@pytest.mark.parametrize(("loss", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0)])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_losses_of_pairs(loss, smoothing, beta):
    config = DpoConfig(beta=beta, loss=loss, label_smoothing=smoothing)
    chosen, rejected = torch.tensor([0.0, 3.0, -7.0, 0.1, 40.0]), torch.tensor([0.0, -9.0, 5.0, 0.2, 1.0])
    expected = [FORMULAS[loss](h, beta, smoothing) for h in (chosen.double() - rejected.double()).tolist()]
    losses = preference_losses(chosen, rejected, config)
    torch.testing.assert_close(losses.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)


def test_a_far_wrong_pair_has_a_finite_loss():
    far = torch.tensor([-1e4]).requires_grad_()
    loss = preference_losses(far, torch.tensor([1e4]), DpoConfig())
    loss.backward()
    assert loss.item() == pytest.approx(2000) and far.grad.item() == pytest.approx(-0.1)


def test_sums_over_answers():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    sums = answer_sums(values, torch.tensor([1, 0, 3]))
    assert sums.tolist() == [1, 0, 14]
    (sums * torch.tensor([1.0, 5.0, 3.0])).sum().backward()
    assert values.grad.tolist() == [1, 3, 3, 3]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"beta": 0.0}, "--dpo.beta 0.0"),
        ({"label_smoothing": 0.5}, "--dpo.label-smoothing 0.5"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "is for --dpo.loss sigmoid, not for ipo"),
    ],
)
def test_impossible_flags(flags, problem):
    with pytest.raises(UserError, match=problem):
        DpoConfig(**flags)
