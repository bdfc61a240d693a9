"""The optimizer step in every precision, and when fp16 overflows."""

import threading

import pytest
import torch
import torch.distributed as dist
from conftest import run_ranks
from test_distributed import whole
from test_matrix import build
from test_packing import documents_of

from minillama.distributed import FsdpConfig, initialise, make_mesh, materialise, set_dtypes, shard
from minillama.errors import UserError
from minillama.hf import load_weights
from minillama.optim import LossScaler, OptimConfig, make_optimizer
from minillama.packing import collate, pack
from minillama.train import TrainConfig, count_steps, prefetched, steps, train_step


def prepared(kind, folder, fsdp, optim=None):
    model = build(kind, folder)
    set_dtypes(model, fsdp)
    shard(model, make_mesh(fsdp, "cpu"), fsdp)
    materialise(model, "cpu")
    initialise(model, 3, loaded=load_weights(model, folder))
    return model, make_optimizer(model.parameters(), optim or OptimConfig(lr=3e-3))


def trajectories(mesh, folder):
    """The losses of 20 steps in each precision, and the dtypes met on the way."""
    packed = pack(documents_of([20] * 8), 20, 0)
    config = TrainConfig(epochs=5, max_steps=20, batch_size=1)
    results = {}
    for precision in ("fp32", "mixed", "bf16", "fp16"):
        fsdp = FsdpConfig(strategy="full-shard", precision=precision)
        kind = "anyprecision" if precision == "bf16" else "adamw"
        model, optimizer = prepared("full", folder, fsdp, OptimConfig(lr=3e-3, kind=kind))
        tables = set()
        for block in model.model.layers:
            block.register_forward_pre_hook(lambda _, args, to=tables: to.update(table.dtype for table in args[1]))
        scaler = LossScaler() if precision == "fp16" else None
        losses, seen, norms = [], set(), set()
        for step in steps(packed, config, 4, dist.get_rank(), mesh.size(), config.begin(mesh.size())):
            batches = [collate(packed, packs, 0, "cpu") for packs in step.micro_batches]
            loss, norm = train_step(model, optimizer, batches, clip_norm=1.0, scaler=scaler)
            losses.append(loss.item())
            seen.add(norm.isfinite().item())
            norms.add(norm.dtype)
        masters = {p.dtype for p in model.parameters()}
        results[precision] = (losses, seen, masters, tables, norms)
    return results


def test_every_precision_learns_the_same(tiny_folder):
    one, two = run_ranks(trajectories, 2, tiny_folder)
    assert one == two
    assert all(norms == {torch.float32} for *_, norms in one.values())
    exact = torch.tensor(one["fp32"][0])
    assert exact[-1] < exact[0] - 1
    for precision, bound in {"mixed": 0.03, "bf16": 0.06, "fp16": 0.01}.items():
        losses, finite, masters, tables, _ = one[precision]
        difference = (torch.tensor(losses) - exact).abs().max().item()
        assert 0 < difference < bound, (precision, difference)
        assert finite == {True}
        assert masters == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert tables == {torch.float32}  # RoPE


def overflowing(mesh, folder, kind):
    """(changed, norm finite, scale after) of three steps; rank 1's gradient overflows in the first alone."""
    fsdp = FsdpConfig(strategy="full-shard", precision="fp16")
    model, optimizer = prepared(kind, folder, fsdp)
    packed = pack(documents_of([20] * 4), 20, 0)
    batches = [collate(packed, [dist.get_rank(), 2 + dist.get_rank()], 0, "cpu")]
    scaler, results = LossScaler(), []
    for number in range(3):
        overflow = dist.get_rank() == 1 and number == 0
        hook = model.model.norm.register_forward_hook(
            lambda _, args, out, by=torch.inf if overflow else 1.0: out.register_hook(lambda grad: grad * by) and None
        )
        before = whole(model)
        loss, norm = train_step(model, optimizer, batches, clip_norm=1.0, scaler=scaler)
        hook.remove()
        assert torch.isfinite(loss) and all(p.grad is None for p in model.parameters())
        after = whole(model)
        assert all(torch.isfinite(value).all() for value in after.values())
        changed = any(not torch.equal(before[name], after[name]) for name in before)
        results.append((changed, norm.isfinite().item(), scaler.scale))
    return results, [state["step"].item() for state in optimizer.state.values()]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(tiny_folder, kind):
    for results, counts in run_ranks(overflowing, 2, tiny_folder, kind):
        assert results == [(False, False, 2.0**15), (True, True, 2.0**15), (True, True, 2.0**15)]
        assert set(counts) == {2}  # Adam's bias correction does not count the skipped one


def overflowing_forever(mesh, folder):
    model, optimizer = prepared("full", folder, FsdpConfig(strategy="full-shard", precision="fp16"))
    packed = pack(documents_of([20]), 20, 0)
    scaler = LossScaler()
    model.model.norm.register_forward_hook(
        lambda _, args, out: out.register_hook(lambda grad: grad * torch.inf) and None
    )
    with pytest.raises(UserError, match="training has diverged"):
        for _ in range(20):
            train_step(model, optimizer, [collate(packed, [0], 0, "cpu")], scaler=scaler)
    return scaler.scale


def test_a_gradient_that_always_overflows_ends_the_run(tiny_folder):
    assert run_ranks(overflowing_forever, 1, tiny_folder) == [0.5]


def test_a_step_takes_its_share_of_an_epoch():
    packed = pack(documents_of([20] * 13), 20, 0)
    config = TrainConfig(epochs=2, batch_size=2, accumulate=2)
    all_steps = [list(steps(packed, config, 0, rank, 2, config.begin(2))) for rank in range(2)]
    assert [len(s) for s in all_steps] == [count_steps(packed, config, 8)] * 2 == [4, 4]
    assert [(s.number, s.epoch, s.ends_epoch, s.is_last) for s in all_steps[0]] == [
        (0, 0, False, False),
        (1, 0, True, False),
        (2, 1, False, False),
        (3, 1, True, True),
    ]
    for epoch in range(2):
        taken = [pack for s in all_steps for step in s if step.epoch == epoch for m in step.micro_batches for pack in m]
        assert sorted(taken) == list(range(13))
    assert all(len(a.micro_batches) == len(b.micro_batches) for a, b in zip(*all_steps, strict=True))


def test_the_next_batches_are_made_while_a_step_is():
    loaded, made = [], []
    second = threading.Event()

    def load(step):
        loaded.append(step)
        if step == 1:
            second.set()
        if step == 3:
            raise UserError("row 3 is bad")
        return [step]

    with pytest.raises(UserError, match="row 3 is bad"):
        for step, ready in prefetched(range(5), load):
            made.extend(ready.result())
            assert second.wait(10), "the batches of step 1 come while step 0 is made"
            assert step in loaded and step + 2 not in loaded
    assert made == [0, 1, 2]
