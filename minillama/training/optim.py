"""The optimizer, the learning rate of each step, the loss scale of fp16."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minillama.errors import UserError
from minillama.model.device import device_kind
from minillama.parallel.sharding import local

PART = {"cpu": 2**18, "cuda": 2**22}
"""Elements that CompensatedAdamW updates at a time: few enough that the fp32 copies fit in a CPU's cache, and enough to
keep a GPU busy."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, betas 0.9 and 0.999, eps 1e-8."""

    lr: float = 1e-4
    """The highest learning rate."""
    weight_decay: float = 0.0
    """Decoupled decay, times the learning rate. Norms and biases, parameters of less than two dimensions, are not
    decayed unless --optim.decay-norms."""
    decay_norms: bool = False
    """Decay every trained parameter, as llama-recipes does."""
    kind: Literal["adamw", "anyprecision"] = "adamw"
    """adamw: moments are fp32. anyprecision: moments are bf16, half the memory. With either, a bf16 parameter keeps its
    rounding error in a second bf16 number, so that small updates are not lost."""
    schedule: Literal["cosine", "linear", "constant", "step"] = "cosine"
    """After warmup: down to 0 along a half cosine or a line, constant, or times gamma after each epoch."""
    gamma: float = 0.85
    """Factor of the learning rate from epoch to epoch under --optim.schedule step; other schedules do not use it."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises linearly to --optim.lr."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise UserError(f"--optim.lr {self.lr}: must be a finite number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"--optim.weight-decay {self.weight_decay}: must not be negative")
        if not 0 < self.gamma <= 1:
            raise UserError(f"--optim.gamma {self.gamma}: must be above 0 and at most 1")
        if self.warmup_steps < 0:
            raise UserError(f"--optim.warmup-steps {self.warmup_steps}: must not be negative")


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig, lr_factors: Mapping[Tensor, float] | None = None
) -> torch.optim.Optimizer:
    """AdamW over the trainable ones of `parameters`. Its state is sharded like them, and exists from the start.

    lr_factors: of those whose learning rate is another, by how much; a group has it as "lr_factor".
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    alike: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in trainable:
        decay = config.weight_decay if config.decay_norms or parameter.ndim >= 2 else 0.0
        alike.setdefault(((lr_factors or {}).get(parameter, 1.0), decay), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": members, "weight_decay": decay, "lr": config.lr * factor, "lr_factor": factor}
        for (factor, decay), members in sorted(alike.items(), key=lambda group: group[0][0] != 1)
    ]
    if config.kind == "adamw" and all(parameter.dtype == torch.float32 for parameter in trainable):
        adamw = torch.optim.AdamW(groups, lr=config.lr, fused=True)
        for parameter in trainable:  # as its first step would do: a checkpoint is loaded into it before that
            step = torch.zeros((), device=local(parameter).device)
            zeros = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
            adamw.state[parameter] = {"step": step, **zeros}
        return adamw
    moments = {"adamw": torch.float32, "anyprecision": torch.bfloat16}[config.kind]
    return CompensatedAdamW(groups, lr=config.lr, moments=moments)


class CompensatedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's arithmetic, in fp32, for parameters and moments that may be stored in bf16.

    bf16 has 8 significant bits: a change below 1/512 of a number is rounded away, in every step. With a small learning rate
    most updates are below that, and the second moment, times beta2 = 0.999 each step, does not shrink. Two remedies:

    A bf16 parameter has a state `remainder`, also bf16: the value that is trained is parameter + remainder.

    The rounding error of a bf16 moment, or of the remainder, is not stored. It is rounded up in a fraction of the steps
    that is its fraction of the distance to the next bf16 number, so over several steps nothing is lost. This is
    stochastic rounding with a low-discrepancy sequence (the fractional parts of multiples of the golden ratio) instead of
    random numbers: it depends on the step alone, so it is the same for any number of ranks and has no state to save.

    A bf16 weight costs 2 (remainder) + 2 * 2 (bf16 moments) or 2 * 4 (fp32 moments) bytes of state.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        moments: torch.dtype = torch.float32,
    ) -> None:
        self.moments = moments
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dtype not in (torch.float32, torch.bfloat16):
                    raise ValueError(f"a parameter is {parameter.dtype}: only float32 and bfloat16 are trained")
                dtypes = self._state_dtypes(parameter)
                zeros = {key: torch.zeros_like(parameter.detach(), dtype=dtype) for key, dtype in dtypes.items()}
                self.state[parameter] = {"step": torch.tensor(0.0), **zeros}

    def _state_dtypes(self, parameter: Tensor) -> dict[str, torch.dtype]:
        """The dtypes of the state besides `step`, an fp32 scalar on the CPU as in torch's optimizers."""
        dtypes = {"exp_avg": self.moments, "exp_avg_sq": self.moments}
        return dtypes | {"remainder": torch.bfloat16} if parameter.dtype == torch.bfloat16 else dtypes

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                tensors = [parameter, parameter.grad, *(state[key] for key in self._state_dtypes(parameter))]
                flat = [local(tensor).view(-1) for tensor in tensors]
                for part in zip(*(tensor.split(PART[device_kind(tensor)]) for tensor in flat), strict=True):
                    _update(*part, step=state["step"].item(), group=group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast every state to the dtype of its parameter: here each has its own dtype."""
        super().load_state_dict(state_dict | {"state": {}})
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            if saved := state_dict["state"].get(name):
                self.state[parameter] = {"step": saved["step"]} | {
                    key: saved[key].to(parameter.device, dtype) for key, dtype in self._state_dtypes(parameter).items()
                }


def _update(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    remainder: Tensor | None = None,
    *,
    step: float,
    group: dict[str, Any],
) -> None:
    """One step of AdamW on flat tensors of one length, in place."""
    beta1, beta2 = group["betas"]
    # float() of an fp32 tensor is the tensor itself, which is then updated in place
    value, gradient, mean, square = (t.float() for t in (parameter, gradient, exp_avg, exp_avg_sq))
    if remainder is not None:
        value.add_(remainder)
    if group["weight_decay"]:
        value.mul_(1 - group["lr"] * group["weight_decay"])
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    value.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))
    if remainder is not None:
        parameter.copy_(value)
        remainder.copy_(_dither(value.sub_(parameter), step))
    if mean is not exp_avg:
        exp_avg.copy_(_dither(mean, step))
        exp_avg_sq.copy_(_dither(square, step))


def _dither(x: Tensor, step: float) -> Tensor:
    """Rounds fp32 numbers in place to bf16 values, the next larger or smaller one, see CompensatedAdamW.

    bf16 is the upper half of fp32's bits. The lower half is a fraction of the distance to the next larger magnitude: it
    carries over if that fraction and the step's, between 0 and 1, sum to 1 or more.
    """
    fraction = step * (math.sqrt(5) - 1) / 2 % 1
    x.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)  # the bits of a GPU's NaN would overflow to -0
    x.view(torch.int32).add_(int(fraction * 2**16)).bitwise_and_(-(2**16))
    return x


class LossScaler:
    """The factor of the loss that keeps gradients within the range of fp16: halved when they overflow, doubled after
    2000 steps in which they did not. Every rank must call it with the same values."""

    def __init__(self) -> None:
        self.scale = 2.0**16
        self.finite_steps = 0  # finite steps in a row since the scale changed

    def update(self, finite: bool) -> None:
        """finite: whether the gradient of the step, on any rank, was."""
        self.finite_steps = self.finite_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.finite_steps == 2000:
            self.scale, self.finite_steps = min(2 * self.scale, 2.0**24), 0
        if self.scale < 1:
            raise UserError(
                "the gradient is not finite at any loss scale down to 1: training has diverged; try a lower --optim.lr, "
                "or --fsdp.precision bf16 or mixed, which have the range of fp32"
            )

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "finite_steps": self.finite_steps}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.scale, self.finite_steps = state_dict["scale"], int(state_dict["finite_steps"])


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
