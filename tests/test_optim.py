import math
from functools import partial

import pytest
import torch
from conftest import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from minillama.errors import UserError
from minillama.parallel.sharding import like, local
from minillama.training import optim
from minillama.training.optim import CompensatedAdamW, LossScaler, OptimConfig, learning_rate, make_optimizer

bf16, fp32 = torch.bfloat16, torch.float32
plain_adamw = partial(torch.optim.AdamW, weight_decay=0.0, foreach=False)


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


@pytest.mark.parametrize(
    "name, wrong",
    [("lr", (0.0, math.inf)), ("weight_decay", (-1.0, math.inf)), ("gamma", (0.0, 1.5)), ("warmup_steps", (-1,))],
)
def test_impossible_settings(name, wrong):
    OptimConfig(lr=1e-9, weight_decay=0.0, gamma=1.0, warmup_steps=0)
    for value in wrong:
        with pytest.raises(UserError, match=f"--optim.{name.replace('_', '-')} {value}: must"):
            OptimConfig(**{name: value})


def test_adamw_by_hand_and_frozen_left_alone():
    trained, frozen = nn.Parameter(torch.tensor([[1.0]])), nn.Parameter(torch.tensor([[1.0]]), requires_grad=False)
    optimizer = make_optimizer([trained, frozen], OptimConfig(lr=0.1, weight_decay=0.5))
    trained.grad = torch.tensor([[3.0]])
    optimizer.step()
    # decay first, then the first step's full length lr * g / |g|
    assert trained.item() == pytest.approx(1 - 0.1 * 0.5 - 0.1, abs=1e-6)
    assert frozen.item() == 1


@pytest.mark.parametrize("kind", ["adamw", "anyprecision"])
@pytest.mark.parametrize("decay_norms", [False, True])
def test_norms_and_biases_are_decayed_only_on_demand(kind, decay_norms):
    norm, weight = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 3))
    optimizer = make_optimizer([norm, weight], OptimConfig(0.1, weight_decay=0.5, decay_norms=decay_norms, kind=kind))
    norm.grad, weight.grad = torch.zeros(3), torch.zeros(2, 3)
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.full((2, 3), 0.95))
    torch.testing.assert_close(norm.data, torch.full((3,), 0.95 if decay_norms else 1.0))
    assert len(optimizer.param_groups) == (1 if decay_norms else 2)


@pytest.mark.parametrize(
    ("kind", "dtype", "expected", "type_"),
    [
        ("adamw", fp32, 4 + 4, torch.optim.AdamW),
        ("adamw", bf16, 4 + 4 + 2, CompensatedAdamW),
        ("anyprecision", fp32, 2 + 2, CompensatedAdamW),
        ("anyprecision", bf16, 2 + 2 + 2, CompensatedAdamW),
    ],
)
def test_bytes_of_state_a_parameter(kind, dtype, expected, type_):
    parameter = nn.Parameter(torch.ones(10, 10, dtype=dtype))
    optimizer = make_optimizer([parameter], OptimConfig(kind=kind))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert type(optimizer) is type_
    state = optimizer.state[parameter]
    assert sum(t.nbytes for key, t in state.items() if key != "step") == expected * parameter.numel()


def test_compensated_adamw_in_fp32_is_torchs(monkeypatch):
    monkeypatch.setattr(optim, "PART", {"cpu": 7})  # the last part is shorter
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 9), torch.randn(50, 5, 9)
    gradients[:, 0] *= 1e-8  # of eps's size
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = (
        CompensatedAdamW([ours], lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1),
    )
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def trained_value(optimizer, parameter):
    """What the parameter stands for: with its remainder, where it has one."""
    return parameter.detach().float() + optimizer.state[parameter].get("remainder", torch.zeros(())).float()


def constant_gradient(make, dtype, start, lr, steps):
    parameter = nn.Parameter(torch.tensor([start, -start], dtype=dtype))
    optimizer = make([parameter], lr=lr)
    parameter.grad = torch.tensor([1.0, -1.0], dtype=dtype)
    for _ in range(steps):
        optimizer.step()
    return trained_value(optimizer, parameter)


@pytest.mark.parametrize(("start", "lr", "steps"), [(0.5, 1e-5, 1000), (1.0, 1e-6, 3000)])
def test_small_steps_are_not_rounded_away(start, lr, steps):
    """The second is a norm's weight: a single step is below half the last bit even of the remainder."""
    reference = constant_gradient(plain_adamw, fp32, start, lr, steps)
    assert reference.tolist() == pytest.approx([start - lr * steps, lr * steps - start], abs=lr * steps * 0.02)
    ours = constant_gradient(partial(CompensatedAdamW, moments=bf16), bf16, start, lr, steps)
    torch.testing.assert_close(ours, reference, rtol=0, atol=lr * steps * 0.005)
    assert constant_gradient(plain_adamw, bf16, start, lr, steps).tolist() == [start, -start]


def test_the_second_moment_neither_stops_growing_nor_shrinking():
    for make, tolerance, expected in (
        (plain_adamw, 1e-9, (0.5, 0.5)),
        (partial(CompensatedAdamW, moments=bf16), 0.03, (1 - 0.999**2000, (1 - 0.999**2000) * 0.999**5000)),
    ):
        parameter = nn.Parameter(torch.ones(1, dtype=bf16))
        optimizer = make([parameter], lr=1e-5)
        for steps, gradient, value in ((2000, 1.0, expected[0]), (5000, 0.0, expected[1])):
            parameter.grad = torch.full((1,), gradient, dtype=bf16)
            for _ in range(steps):
                optimizer.step()
            assert optimizer.state[parameter]["exp_avg_sq"].item() == pytest.approx(value, rel=tolerance)


def noisy_least_squares(make, dtype, steps=600):
    """(value at the end, its distance from the start, mean squared error) of weights fitted to noisy targets."""
    draw = partial(torch.randn, 1000, generator=torch.Generator().manual_seed(0))
    start, target = (0.02 * draw()).to(bf16), 0.02 * draw()
    weight = nn.Parameter(start.to(dtype))
    optimizer = make([weight], lr=1e-5)
    for _ in range(steps):
        weight.grad = (weight.detach().float() - target + 0.02 * draw()).to(dtype)
        optimizer.step()
    value = trained_value(optimizer, weight)
    return value, (value - start.float()).norm(), (value - target).square().mean().item()


def test_bf16_training_tracks_fp32():
    reference, moved, loss = noisy_least_squares(plain_adamw, fp32)
    value, _, its_loss = noisy_least_squares(partial(CompensatedAdamW, moments=fp32), bf16)
    assert (value - reference).norm() < 0.005 * moved and its_loss == pytest.approx(loss, rel=1e-4)
    value, _, its_loss = noisy_least_squares(partial(CompensatedAdamW, moments=bf16), bf16)
    assert (value - reference).norm() < 0.01 * moved and its_loss == pytest.approx(loss, rel=1e-3)
    value, _, _ = noisy_least_squares(plain_adamw, bf16)
    assert (value - reference).norm() > 0.8 * moved


def test_what_is_not_finite_stays_so():
    for gradient in (math.inf, -math.inf, math.nan):
        parameter = nn.Parameter(torch.ones(1, dtype=bf16))
        optimizer = CompensatedAdamW([parameter], lr=0.1, moments=bf16)
        parameter.grad = torch.full((1,), gradient, dtype=bf16)
        for _ in range(3):
            optimizer.step()
            state = optimizer.state[parameter]
            assert not any(t.isfinite() for t in (parameter, state["exp_avg"], state["exp_avg_sq"]))
    # a GPU's NaN, the largest bits that are one, would overflow
    largest = torch.tensor([2**31 - 1, -1, 0x7F800000], dtype=torch.int32).view(fp32)
    for step in range(1, 50):
        assert not optim._dither(largest.clone(), step).isfinite().any()
        assert optim._dither(torch.tensor([-math.inf, math.inf]), step).tolist() == [-math.inf, math.inf]


def test_dither_gives_the_two_neighbours_in_the_right_shares():
    x = torch.tensor([1 + 0.25 / 128, -1 - 0.25 / 128, 3.0, 0.0, -0.0])
    rounded = torch.stack([optim._dither(x.clone(), step) for step in range(1, 1001)])
    assert torch.equal(rounded, rounded.to(bf16).float())
    assert rounded.unique().tolist() == [-1 - 1 / 128, -1, 0, 1, 1 + 1 / 128, 3]
    torch.testing.assert_close(rounded.mean(0), x, rtol=0, atol=2e-3 / 128)


SHAPES = {"matrix": (5, 3), "one": (1,), "bias": (7,)}  # of "one" the second rank has nothing


class Some(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=random).to(dtype)))


def some_steps(model, optimizer, steps):
    for step in steps:
        random = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = like(torch.randn(parameter.shape, generator=random).to(parameter.dtype), parameter)
        optimizer.step()


def bits(model, optimizer):
    """Every parameter and state as whole numbers, so that equal means equal bits."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, tensor in {"parameter": parameter.detach(), **optimizer.state[parameter]}.items():
            whole = getattr(tensor, "full_tensor", lambda t=tensor: t)()
            integers = {bf16: torch.int16, fp32: torch.int32}[whole.dtype]
            found[f"{name} {key} {whole.dtype}"] = whole.reshape(-1).view(integers).tolist()
    return found


def train_and_resume(mesh, dtype, config):
    """Bits after 6 steps at one go, and after 3 and 3 in another optimizer, which got the state of the first."""
    models, optimizers = [], []
    for _ in range(3):
        model = Some(dtype)
        models.append(fully_shard(model, mesh=mesh) if mesh else model)
        optimizers.append(make_optimizer(model.parameters(), config))
    some_steps(models[0], optimizers[0], range(6))
    some_steps(models[1], optimizers[1], range(3))
    for ours, theirs in zip(models[2].parameters(), models[1].parameters(), strict=True):
        local(ours).data.copy_(local(theirs).data)
    set_optimizer_state_dict(models[2], optimizers[2], get_optimizer_state_dict(models[1], optimizers[1]))
    assert bits(models[2], optimizers[2]) == bits(models[1], optimizers[1])
    some_steps(models[2], optimizers[2], range(3, 6))
    return bits(models[0], optimizers[0]), bits(models[2], optimizers[2])


def train_and_resume_all(mesh):
    configs = {kind: OptimConfig(1e-2, weight_decay=0.1, kind=kind) for kind in ("adamw", "anyprecision")}
    return [train_and_resume(mesh, dtype, configs[kind]) for kind, dtype in COMPENSATED]


COMPENSATED = [("adamw", bf16), ("anyprecision", fp32), ("anyprecision", bf16)]


def test_any_number_of_ranks_and_a_resumed_run_give_the_same_bits():
    alone = train_and_resume_all(None)
    for straight, resumed in alone:
        assert straight == resumed
    assert run_ranks(train_and_resume_all, 2) == [alone, alone]


@pytest.mark.parametrize(("kind", "dtype"), COMPENSATED)
def test_state_dict_keeps_every_bit(kind, dtype, tmp_path):
    config = OptimConfig(1e-2, kind=kind)
    model, other = Some(dtype), Some(dtype)
    optimizer, fresh = (make_optimizer(m.parameters(), config) for m in (model, other))
    some_steps(model, optimizer, range(3))
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
    weights, state = torch.load(tmp_path / "saved.pt")
    other.load_state_dict(weights)
    fresh.load_state_dict(state)
    some_steps(model, optimizer, range(3, 6))
    some_steps(other, fresh, range(3, 6))
    assert bits(other, fresh) == bits(model, optimizer)


def test_only_fp32_and_bf16_are_trained():
    with pytest.raises(ValueError, match="float16"):
        make_optimizer([nn.Parameter(torch.ones(1, dtype=torch.float16))], OptimConfig())


def test_loss_scale():
    scaler = LossScaler()
    scaler.update(True)
    scaler.update(False)
    assert scaler.scale == 2**15
    for _ in range(1999):
        scaler.update(True)
    assert scaler.scale == 2**15

    resumed = LossScaler()
    resumed.load_state_dict(scaler.state_dict())
    for each in (scaler, resumed):
        each.update(True)
        assert each.scale == 2**16
    for _ in range(10 * 2000):
        scaler.update(True)
    assert scaler.scale == 2**24

    for _ in range(16):
        resumed.update(False)
    assert resumed.scale == 1
    with pytest.raises(UserError, match=r"training has diverged.*--optim.lr.*--fsdp.precision bf16 or mixed"):
        resumed.update(False)


def test_a_parameter_may_have_another_learning_rate():
    """The first step of Adam changes each number by its learning rate: B's is a multiple of A's."""
    pair = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))]
    optimizer = make_optimizer(pair, OptimConfig(lr=0.01), {pair[1]: 16.0})
    for parameter in pair:
        parameter.grad = torch.full_like(parameter, 0.3)
    optimizer.step()
    assert [1 - parameter.mean().item() for parameter in pair] == pytest.approx([0.01, 0.16], rel=1e-4)
    assert [group["lr_factor"] for group in optimizer.param_groups] == [1.0, 16.0]
