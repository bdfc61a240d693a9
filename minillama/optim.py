"""The optimizer and the learning rate of each step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from minillama.errors import UserError


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, betas 0.9 and 0.999, eps 1e-8."""

    lr: float = 1e-4
    """The highest learning rate."""
    weight_decay: float = 0.0
    """Decoupled decay of every trained parameter, times the learning rate."""
    schedule: Literal["cosine", "linear", "constant", "step"] = "cosine"
    """After warmup: down to 0 along a half cosine or a line, constant, or times gamma after each epoch."""
    gamma: float = 0.85
    """Factor of the learning rate from epoch to epoch under --optim.schedule step; other schedules do not use it."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises linearly to --optim.lr."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise UserError(f"--optim.lr {self.lr}: must be above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"--optim.weight-decay {self.weight_decay}: must not be negative")
        if not 0 < self.gamma <= 1:
            raise UserError(f"--optim.gamma {self.gamma}: must be above 0 and at most 1")
        if self.warmup_steps < 0:
            raise UserError(f"--optim.warmup-steps {self.warmup_steps}: must not be negative")


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable ones of `parameters`; its state has their dtype and their sharding."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def learning_rate(step: int, epoch: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of a step, both counted from 0, in a run of `steps` steps.

    Warmup reaches config.lr with its last step; cosine and linear would reach 0 with the step after the last.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    factor = {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "constant": 1.0,
        "step": config.gamma**epoch,
    }[config.schedule]
    return config.lr * factor
