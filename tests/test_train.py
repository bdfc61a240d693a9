"""The optimizer step in every precision, on a model sharded in any way, and when fp16 overflows."""

import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import random_model, run_ranks
from test_distributed import whole
from test_matrix import build
from test_packing import documents_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.data.batch import collate
from minillama.data.packing import pack
from minillama.errors import UserError
from minillama.formats.hf import load_weights
from minillama.parallel.initialise import initialise, materialise
from minillama.parallel.sharding import FsdpConfig, local, make_mesh, set_dtypes, shard, summed_gradients
from minillama.training.optim import LossScaler, OptimConfig, make_optimizer
from minillama.training.plan import EvalConfig, Progress, TrainConfig, count_steps, eval_batches, prefetched, steps
from minillama.training.step import evaluate, gradient_norm, train_step


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
    assert [(s.number, s.epoch, s.cursor, s.progress, s.ends_epoch, s.is_last) for s in all_steps[0]] == [
        (0, 0, 8, 8 / 13, False, False),
        (1, 0, 13, 1, True, False),
        (2, 1, 8, 1 + 8 / 13, False, False),
        (3, 1, 13, 2, True, True),
    ]
    for epoch in range(2):
        taken = [pack for s in all_steps for step in s if step.epoch == epoch for m in step.micro_batches for pack in m]
        assert sorted(taken) == list(range(13))
    assert all(len(a.micro_batches) == len(b.micro_batches) for a, b in zip(*all_steps, strict=True))
    for number, start in ((1, Progress(8, step=1, cursor=8)), (3, Progress(8, step=3, epoch=1, cursor=8))):
        for s, again in zip(all_steps[0][number:], steps(packed, config, 0, 0, 2, start), strict=True):
            assert replace(s, micro_batches=[]) == replace(again, micro_batches=[])
            assert all(map(np.array_equal, s.micro_batches, again.micro_batches))
    three = list(steps(packed, replace(config, max_steps=3), 0, 0, 2, config.begin(2)))
    assert [s.is_last for s in three] == [False, False, True]
    assert [count_steps(packed, replace(config, max_steps=most), 8) for most in (3, 4, 5)] == [3, 4, 4]


def test_when_an_evaluation_is_due():
    packed = pack(documents_of([20] * 13), 20, 0)
    plan = list(steps(packed, TrainConfig(epochs=2, batch_size=4), 0, 0, 1, Progress(4)))
    for every, due in ((0, [4, 8]), (3, [3, 6, 8]), (1, [1, 2, 3, 4, 5, 6, 7, 8])):
        assert [step.number + 1 for step in plan if EvalConfig(every=every).due(step)] == due


def test_an_evaluation_takes_each_pack_once_or_the_same_few():
    packed = pack(documents_of([20] * 13), 20, 0)

    def taken(now=2, **config):
        evaluation = EvalConfig(batch_size=2, **config)
        ranks = [list(eval_batches(packed, evaluation, 0, "cpu", rank, now, 2)) for rank in range(now)]
        assert len({len(batches) for batches in ranks}) == 1
        return [row.tolist() for batches in zip(*ranks, strict=True) for batch in batches for row in batch.tokens]

    rows = [row for row in taken() if row != [0]]  # where a rank has none left
    assert sorted(rows) == sorted(packed.documents.tokens.reshape(13, 20).tolist())
    assert taken(max_steps=2) == rows[:8]
    for now in (1, 3, 4):  # after a machine is lost or comes back
        assert [row for row in taken(now, max_steps=2) if row != [0]] == rows[:8]


def test_the_evaluation_is_the_mean_over_trained_tokens():
    model = random_model()
    batches = [collate(pack(documents_of([20] * 6, seed), 20, 0), [0, 3], 0, "cpu") for seed in range(2)]
    logits = torch.cat([model(batch.tokens).flatten(0, 1) for batch in batches]).double()
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    expected = nn.functional.cross_entropy(logits, labels).item(), int((labels != -100).sum())
    for training in (True, False):
        assert evaluate(model.train(training), batches) == pytest.approx(expected, rel=1e-6)
        assert model.training == training
    assert evaluate(model, batches, stopping=iter([False, True]).__next__) is None
    untrained = replace(batches[0], labels=torch.full_like(batches[0].labels, -100), trained=0)
    with pytest.raises(UserError, match="the validation set has no token to predict"):
        evaluate(model, [untrained])


@pytest.mark.parametrize(
    ("kind", "flags", "least", "wrong"),
    [
        (TrainConfig, "train", {"epochs": 1, "batch_size": 1, "accumulate": 1}, 0),
        (TrainConfig, "train", {"max_steps": 0, "freeze_layers": 0, "clip_norm": 0}, -1),
        (TrainConfig, "train", {"clip_norm": 0}, float("inf")),
        (EvalConfig, "eval", {"batch_size": 1}, 0),
        (EvalConfig, "eval", {"every": 0, "max_steps": 0}, -1),
    ],
)
def test_impossible_settings(kind, flags, least, wrong):
    kind(**least)
    for name in least:
        with pytest.raises(UserError, match=rf"--{flags}\.{name.replace('_', '-')} {wrong}: must be at least"):
            kind(**{name: wrong})


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


def fully_sharded(model, mesh=None, blocks=True):
    """As a user writes it, who knows nothing of ours."""
    for block in model.model.layers if blocks else ():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def replicated(model, mesh):
    return fully_sharded(model, init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "parts")))


def with_ignored(model, mesh):
    name = "model.layers.1.mlp.up_proj.weight"
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [name])
    return DistributedDataParallel(model)


def of_one_rank(model, mesh):
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "parts"))
    return DistributedDataParallel(model, process_group=mesh.get_group("parts"))


WAYS = {
    "unwrapped": lambda model, mesh: model,
    "DistributedDataParallel": lambda model, mesh: DistributedDataParallel(model),
    "fully_shard": lambda model, mesh: fully_sharded(model),
    "fully_shard of the root alone": partial(fully_sharded, blocks=False),
    "fully_shard in two copies": replicated,
    "shard": lambda model, mesh: shard(model, mesh, FsdpConfig(precision="fp32")),
}
REFUSED = {
    "unwrapped": r"is a plain parameter, of which each of the 2 processes trains its own",
    "blocks alone": r"model\.embed_tokens\.weight is a plain parameter",
    "DistributedDataParallel but one": r"model\.layers\.1\.mlp\.up_proj\.weight is a plain parameter",
    "DistributedDataParallel of one process": r"is shared by 1 of the 2 processes",
    "fully_shard over one process": r"is sharded over 1 of the 2 processes",
}


def two_steps(mesh, ways):
    """(loss, gradient norm before clipping) of two steps, then the trained weights, for each way to spread a model."""
    results = {}
    for name, lora in ways:
        model = random_model().requires_grad_(not lora).train()
        if lora:
            apply_lora(model, LoraConfig(rank=4, dropout=0.0))
            initialise(model, 3, loaded=[n for n, p in model.named_parameters() if not p.requires_grad])
        spread = WAYS[name](model, mesh)
        optimizer = make_optimizer(spread.parameters(), OptimConfig(lr=1e-2))
        packed = pack(documents_of([20] * 12), 20, 0)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        numbers = []
        for step in range(2):
            # 3 micro-batches of 1 for each of 2 ranks, or of 2
            packs = [list(range(6 * step + 2 * i, 6 * step + 2 * i + 2)) for i in range(3)]
            mine = [p[dist.get_rank() :: ranks] if ranks > 1 else p for p in packs]
            batches = [collate(packed, p, 0, "cpu") for p in mine]
            with torch.no_grad():  # leaves parameters of fully_shard whole
                spread(batches[0].tokens)
            loss, norm = train_step(spread, optimizer, batches, clip_norm=0.5)
            numbers.append((loss.item(), norm.item()))
        numbers.append(evaluate(spread, iter(batches)))
        weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
        results[name, lora] = numbers, {n: p.detach() for n, p in weights.items() if p.requires_grad}
    return results


def test_a_step_is_the_same_however_the_model_was_spread():
    expected = two_steps(None, [("unwrapped", False), ("unwrapped", True)])  # without a process group
    assert all(numbers[1][1] > 0.5 for numbers, _ in expected.values())  # clipped
    with_lora = [("DistributedDataParallel", True), ("fully_shard", True)]
    alone = run_ranks(two_steps, 1, [("unwrapped", False), *with_lora])
    two = run_ranks(two_steps, 2, [(way, False) for way in WAYS if way != "unwrapped"] + with_lora)
    for result in (*alone, *two):
        for (way, lora), (found, found_weights) in result.items():
            numbers, weights = expected["unwrapped", lora]
            assert found_weights.keys() == weights.keys() and len(weights) == (12 if lora else 30)
            torch.testing.assert_close(
                torch.tensor(found), torch.tensor(numbers), rtol=1e-5, atol=1e-6, msg=f"{way}: {found}, not {numbers}"
            )
            for name, value in found_weights.items():
                torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-4, msg=f"{way}: {name}")
    assert two[0].keys() == two[1].keys() and all(two[0][way][0] == two[1][way][0] for way in two[0])


def refusals(mesh):
    def blocks_alone(model, mesh):
        for block in model.model.layers:
            fully_shard(block)
        return model

    def over_one(model, mesh):
        return fully_sharded(model, init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "parts"))["parts"])

    ways = (WAYS["unwrapped"], blocks_alone, with_ignored, of_one_rank, over_one)
    messages = {}
    for name, spread in zip(REFUSED, ways, strict=True):
        model = spread(random_model(), mesh)
        before = [local(p).clone() for p in model.parameters()]
        batch = collate(pack(documents_of([20] * 2), 20, 0), [dist.get_rank()], 0, "cpu")
        with pytest.raises(UserError, match=REFUSED[name]) as error:
            train_step(model, make_optimizer(model.parameters(), OptimConfig()), [batch])
        assert all(torch.equal(a, local(b)) for a, b in zip(before, model.parameters(), strict=True))
        messages[name] = str(error.value)
    frozen = random_model().requires_grad_(False)  # what does not train may be anything
    frozen.model.norm.requires_grad_()
    fully_shard(frozen.model.norm)
    train_step(frozen, make_optimizer(frozen.parameters(), OptimConfig()), [batch])

    linear = nn.Linear(4, 4, bias=False)  # as fully_shard and tensor parallelism leave it together
    two = init_device_mesh("cpu", (1, 2), mesh_dim_names=("samples", "features"))
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.data, two, [Shard(0), Shard(1)]))
    linear.weight.grad = torch.zeros_like(linear.weight)
    with pytest.raises(UserError, match="weight is split along two dimensions of its mesh") as error:
        summed_gradients(linear)
    return messages | {"tensor parallel": str(error.value)}


def test_a_model_whose_gradients_are_not_all_reduced_is_refused_on_all_ranks():
    one, two = run_ranks(refusals, 2)
    assert one == two and all("Give the whole model to minillama.shard" in message for message in one.values())


def norms(mesh):
    """Pairs of the norm of gradients that are spread in every way, and of the same ones whole in float64."""
    one = init_device_mesh("cpu", (4,), mesh_dim_names=("data",))
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    parts = two["shard"]
    spreads = {
        "plain": None,
        "1-D": (one, [Shard(0)]),
        "of the other dimension": (one, [Shard(1)]),
        "replicated": (one, [Replicate()]),
        "hybrid": (two, [Replicate(), Shard(0)]),
        "twice": (two, [Shard(0), Shard(1)]),
        "a part of a mesh": (parts, [Shard(0)]),
    }
    torch.manual_seed(0)
    gradients = []
    for number, (name, spread) in enumerate(spreads.items()):
        for shape, dtype in (((5, 3), torch.float32), ((3, 4), torch.bfloat16), ((1, 1), torch.float32)):
            whole = ((number + 1) * torch.randn(shape)).to(dtype)
            gradients.append((name, whole, whole if spread is None else distribute_tensor(whole, *spread)))
    summed = torch.randn(4, 5, 3)
    gradients.append(("partial", summed.sum(0), DTensor.from_local(summed[dist.get_rank()], one, [Partial()])))
    choices = {name: [g for g in gradients if g[0] == name] for name in (*spreads, "partial")}
    choices |= {"all": gradients, "all, the last first": gradients[::-1], "two": choices["plain"] + choices["1-D"]}
    choices |= {"two, the last first": choices["two"][::-1]}
    pairs = {}
    for name, chosen in choices.items():
        found = gradient_norm([gradient for *_, gradient in chosen])
        assert found.dtype == torch.float32 and type(found) is torch.Tensor
        pairs[name] = found.item(), sum(whole.double().square().sum() for _, whole, _ in chosen).sqrt().item()
    return pairs


def test_the_norm_of_gradients_spread_in_any_way_is_that_of_the_whole():
    results = run_ranks(norms, 4)
    assert all(result == results[0] for result in results) and len(results[0]) == 12
    for name, (found, expected) in results[0].items():
        assert found == pytest.approx(expected, rel=1e-6), name


def test_the_norm_of_large_bf16_gradients_and_of_none():
    gradients = [torch.full((1000,), 3.0, dtype=torch.bfloat16), torch.full((7,), 1e-3)]
    assert gradient_norm(gradients).item() == pytest.approx((9000 + 7e-6) ** 0.5, rel=1e-6)
    assert gradient_norm([]) == 0 and gradient_norm([]).dtype == torch.float32


def clipped(mesh, spread, clip_norm=0.25):
    """How far a step of SGD moves each weight; some are plain, some on one mesh, some on another."""
    model = random_model().train()
    if spread:
        fully_shard(model.model.layers[0], mesh=mesh)
        fully_shard(model.lm_head, mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard")))
    before = [local(p).detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=False)
    batch = collate(pack(documents_of([20] * 2), 20, 0), [0, 1], 0, "cpu")
    _, norm = train_step(model, optimizer, [batch], clip_norm=clip_norm)
    return norm.item(), [local(p).detach() - b for p, b in zip(model.parameters(), before, strict=True)]


def test_plain_and_sharded_gradients_are_clipped_together():
    (norm, moved), (same, as_plain) = run_ranks(clipped, 1, True)[0], clipped(None, False)
    longer, whole = clipped(None, False, clip_norm=100.0)
    assert norm == pytest.approx(same, rel=1e-6) and longer == same and 0.5 < norm < 100
    assert sum(m.double().square().sum() for m in whole).sqrt().item() == pytest.approx(norm, rel=1e-4)
    assert sum(m.double().square().sum() for m in moved).sqrt().item() == pytest.approx(0.25, rel=1e-4)
    for a, b in zip(moved, as_plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
