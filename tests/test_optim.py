import pytest
import torch

from minillama.errors import UserError
from minillama.optim import OptimConfig, learning_rate, make_optimizer


def rates(steps, epoch_of=lambda step: 0, **changes):
    config = OptimConfig(lr=1.0, **changes)
    return [learning_rate(step, epoch_of(step), steps, config) for step in range(steps)]


def test_schedules_by_hand():
    assert rates(4, schedule="constant") == [1, 1, 1, 1]
    assert rates(4, schedule="linear") == [1, 0.75, 0.5, 0.25]
    assert rates(4, schedule="cosine") == pytest.approx([1, 0.5 + 0.5 * 0.5**0.5, 0.5, 0.5 - 0.5 * 0.5**0.5])
    assert rates(6, lambda step: step // 2, schedule="step", gamma=0.5) == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_warmup_rises_to_the_full_rate():
    assert rates(6, schedule="linear", warmup_steps=2) == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates(3, schedule="cosine", warmup_steps=5) == [0.2, 0.4, 0.6]


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"weight_decay": -1.0}, {"warmup_steps": -1}])
def test_impossible_settings(wrong):
    with pytest.raises(UserError, match="--optim." + next(iter(wrong)).replace("_", "-")):
        OptimConfig(**wrong)


def test_adamw_by_hand_and_frozen_left_alone():
    trained, frozen = (
        torch.nn.Parameter(torch.tensor([1.0])),
        torch.nn.Parameter(torch.tensor([1.0]), requires_grad=False),
    )
    optimizer = make_optimizer([trained, frozen], OptimConfig(lr=0.1, weight_decay=0.5))
    trained.grad = torch.tensor([3.0])
    optimizer.step()
    # decay first, then the first step's full length lr * g / |g|
    assert trained.item() == pytest.approx(1 - 0.1 * 0.5 - 0.1, abs=1e-6)
    assert frozen.item() == 1
