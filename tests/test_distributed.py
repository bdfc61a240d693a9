"""Sharded training in real processes: any split gives the numbers of one process."""

import json

import pytest
import torch
import torch.distributed as dist
from conftest import random_model, run_ranks, save_folder
from safetensors.torch import load_file
from test_packing import documents_of
from torch.distributed.tensor import DTensor

from minillama.distributed import FsdpConfig, initialise, local, materialise, on_rank_zero, set_dtypes, shard
from minillama.errors import UserError
from minillama.hf import base_parameters, from_pretrained, load_weights, read_config, save_adapter
from minillama.lora import LoraConfig, apply_lora
from minillama.model import Llama
from minillama.optim import OptimConfig, make_optimizer
from minillama.packing import collate, pack
from minillama.train import EvalConfig, TrainConfig, eval_batches, evaluate, steps, train_step

LORA = LoraConfig(rank=4, dropout=0.0, targets=("q_proj", "v_proj", "down_proj"))
FP32 = FsdpConfig(precision="fp32")


def sharded(mesh, folder, fsdp=FP32):
    with torch.device("meta"):
        model = Llama(read_config(folder)).requires_grad_(False)
    apply_lora(model, LORA)
    set_dtypes(model, fsdp)
    shard(model, mesh, fsdp)
    materialise(model, "cpu")
    initialise(model, 7, loaded=load_weights(model, folder))
    return model


def whole(model):
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()}


def train(mesh, folder, batch_size, accumulate, context, recompute="none"):
    """(loss, gradient norm) of each step, the adapters after the last, and the evaluation loss."""
    model = sharded(mesh, folder, FsdpConfig(precision="fp32", recompute=recompute))
    optimizer = make_optimizer(model.parameters(), OptimConfig(lr=1e-2))
    # 8 documents: a context of 20 holds exactly one, of 40 two
    packed = pack(documents_of([20] * 8), context, 0)
    config = TrainConfig(epochs=1, batch_size=batch_size, accumulate=accumulate)
    numbers = []
    for _ in range(3):
        for step in steps(len(packed.packs), config, 0, dist.get_rank(), dist.get_world_size()):
            batches = [collate(packed, packs, 0, "cpu") for packs in step.micro_batches]
            loss, norm = train_step(model, optimizer, batches, clip_norm=0.5)
            numbers.append((loss.item(), norm.item()))
    eval_loss, tokens = evaluate(
        model, eval_batches(packed, EvalConfig(), 0, "cpu", dist.get_rank(), dist.get_world_size())
    )
    adapters = {n: p for n, p in whole(model).items() if "lora" in n}
    return numbers, adapters, eval_loss, tokens


@pytest.mark.parametrize("tied", [False, True])
def test_every_split_of_the_same_samples_trains_the_same(tmp_path, tied):
    folder = save_folder(random_model(tie_word_embeddings=tied), tmp_path, tie_word_embeddings=tied)
    expected = run_ranks(train, 1, folder, 8, 1, 20)[0]  # one document a row, all in one micro-batch
    assert len(expected[0]) == 3 and expected[0][0][0] > expected[0][2][0]
    splits = {
        "accumulation": run_ranks(train, 1, folder, 1, 8, 20),
        "packing": run_ranks(train, 1, folder, 2, 2, 40),
        "2 ranks": run_ranks(train, 2, folder, 2, 2, 20),
        "2 ranks, packed, recomputed": run_ranks(train, 2, folder, 2, 1, 40, "full"),
        "3 ranks, uneven, the last batches short": run_ranks(train, 3, folder, 3, 1, 20),
    }
    for name, results in splits.items():
        for numbers, adapters, eval_loss, tokens in results:
            torch.testing.assert_close(torch.tensor(numbers), torch.tensor(expected[0]), rtol=1e-5, atol=1e-6, msg=name)
            for key, value in adapters.items():
                torch.testing.assert_close(value, expected[1][key], rtol=1e-3, atol=1e-4, msg=f"{name}: {key}")
            assert eval_loss == pytest.approx(expected[2], rel=1e-5) and tokens == expected[3]


def loss_and_gradients(mesh, folder, tokens, labels):
    model = sharded(mesh, folder)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    model(tokens[mine], labels=labels[mine]).backward()
    with torch.no_grad():
        return model(tokens, labels=labels).item(), {
            n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad
        }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_sharded_model_computes_what_the_plain_one_does(tmp_path, tied, world_size):
    folder = save_folder(random_model(tie_word_embeddings=tied), tmp_path, tie_word_embeddings=tied)
    tokens, labels = torch.randint(0, 512, (2, 2, 30))
    plain = apply_lora(from_pretrained(folder), LORA)
    initialise(plain, 7, loaded=base_parameters(plain))
    expected = plain(tokens, labels=labels)
    expected.backward()
    for loss, gradients in run_ranks(loss_and_gradients, world_size, folder, tokens, labels):
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, plain.get_parameter(name).grad, rtol=1e-4, atol=1e-4, msg=name)


def one_step_without_labels(mesh, folder, labels_on):
    """A step in which only the ranks of labels_on have a trained token."""
    model = sharded(mesh, folder)
    optimizer = make_optimizer(model.parameters(), OptimConfig())
    documents = documents_of([20] * 2)
    documents.trained[:] = dist.get_rank() in labels_on
    packed = pack(documents, 20, 0)
    batches = [collate(packed, packs, 0, "cpu") for packs in ([0], [])]
    loss, norm = train_step(model, optimizer, batches)
    return loss.item(), norm.item(), all(torch.isfinite(p).all().item() for p in whole(model).values())


def test_a_rank_without_a_trained_token_breaks_nothing(tiny_folder):
    some = run_ranks(one_step_without_labels, 2, tiny_folder, [1])
    assert some[0] == some[1] and some[0][0] > 1 and some[0][1] > 0 and some[0][2]
    assert run_ranks(one_step_without_labels, 2, tiny_folder, []) == [(0.0, 0.0, True)] * 2


def gradients(mesh, folder):
    model = sharded(mesh, folder)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            local(parameter).data.fill_(0.1)  # with B = 0 there would be no gradient for A
    packed = pack(documents_of([20] * 2), 20, 0)
    batch = collate(packed, [dist.get_rank()], 0, "cpu")
    model(batch.tokens, positions=batch.positions, document_ids=batch.document_ids, labels=batch.labels).backward()
    return {
        name: (
            parameter.requires_grad,
            None if parameter.grad is None else parameter.grad.full_tensor().abs().max().item(),
        )
        for name, parameter in model.named_parameters()
    }


def test_exactly_the_trainable_parameters_get_gradients(tiny_folder):
    for result in run_ranks(gradients, 2, tiny_folder):
        trained = {name for name, (requires_grad, _) in result.items() if requires_grad}
        assert trained == {name for name in result if "lora_" in name} and len(trained) == 3 * 3 * 2
        for name, (_, largest) in result.items():
            assert (largest or 0) > 0 if name in trained else largest is None, name


def state_after_loading(mesh, folder):
    """Filled from NaN: what initialise or load_weights leave out shows."""
    fsdp = FsdpConfig()
    with torch.device("meta"):
        model = Llama(read_config(folder)).requires_grad_(False)
    apply_lora(model, LORA)
    set_dtypes(model, fsdp)
    shard(model, mesh, fsdp)
    materialise(model, "cpu")
    for parameter in model.parameters():
        local(parameter).data.fill_(torch.nan)
    loaded = load_weights(model, folder)
    initialise(model, 7, loaded)
    held = sum(local(p).numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
    return whole(model), held, {n: p.dtype for n, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_loading_and_initialising_fill_everything_alike_on_any_number_of_ranks(tmp_path, tied):
    model = random_model(tie_word_embeddings=tied)
    folder = save_folder(model, tmp_path, tie_word_embeddings=tied)
    one, two, three = (run_ranks(state_after_loading, n, folder) for n in (1, 2, 3))
    expected = one[0][0]
    base = dict(model.named_parameters())
    for state, _, dtypes in [*one, *two, *three]:
        for name, value in state.items():
            assert torch.isfinite(value).all(), name
            assert torch.equal(value, expected[name]), name
            if name in base:
                assert torch.equal(value, base[name].bfloat16())
            assert dtypes[name] == (torch.float32 if "lora_" in name else torch.bfloat16)
            if "lora_B" in name:
                assert not value.any()
    assert [held for _, held, _ in two] == pytest.approx([0.5, 0.5], abs=0.02)
    names = [n for n in expected if "lora_A" in n]
    assert len({expected[n].flatten()[0].item() for n in names}) == len(names)  # each module draws its own numbers


def random_base(mesh, folder):
    fsdp = FsdpConfig(precision="fp32")
    with torch.device("meta"):
        model = Llama(read_config(folder))
    shard(model, mesh, fsdp)
    materialise(model, "cpu")
    for parameter in model.parameters():
        local(parameter).data.fill_(torch.nan)
    initialise(model, 7)
    return whole(model)


def test_without_weights_everything_is_drawn_alike(tiny_folder):
    (one,), (first, second) = run_ranks(random_base, 1, tiny_folder), run_ranks(random_base, 2, tiny_folder)
    for name, value in one.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, first[name]) and torch.equal(value, second[name])


def save_after_evaluation(mesh, folder, out):
    """Without resharding after the forward, which leaves bf16 copies where the fp32 masters should be looked for."""
    with torch.device("meta"):
        model = Llama(read_config(folder)).requires_grad_(False)
    apply_lora(model, LORA)
    set_dtypes(model, FsdpConfig())
    shard(model, mesh, FsdpConfig(), reshard_after_forward=False)
    materialise(model, "cpu")
    initialise(model, 7, load_weights(model, folder))
    before = whole(model)
    packed = pack(documents_of([20] * 2), 20, 0)
    evaluate(model, eval_batches(packed, EvalConfig(), 0, "cpu", dist.get_rank(), 2))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    save_adapter(model, out, LORA, str(folder))
    return before


def test_evaluation_leaves_the_masters_in_place(tiny_folder, tmp_path):
    before = run_ranks(save_after_evaluation, 2, tiny_folder, tmp_path / "a")[0]
    for name, value in load_file(tmp_path / "a/adapter_model.safetensors").items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name.removeprefix("base_model.model.")])


def mixed_against_fp32(mesh, folder):
    packed = pack(documents_of([40] * 2), 40, 0)
    batch = collate(packed, [dist.get_rank()], 0, "cpu")
    results = []
    for precision in ("mixed", "fp32"):
        model = sharded(mesh, folder, FsdpConfig(precision=precision))
        loss = model(batch.tokens, positions=batch.positions, document_ids=batch.document_ids, labels=batch.labels)
        loss.backward()
        results.append((loss.item() / batch.trained, {p.grad.dtype for p in model.parameters() if p.grad is not None}))
    return results


def test_mixed_precision_computes_in_bf16_and_reduces_in_fp32(tiny_folder):
    for (mixed, dtypes), (exact, _) in run_ranks(mixed_against_fp32, 2, tiny_folder):
        assert mixed == pytest.approx(exact, rel=0.02) and mixed != exact
        assert dtypes == {torch.float32}


def save_from_ranks(mesh, folder, out):
    model = sharded(mesh, folder)
    save_adapter(model, out, LORA, str(folder))
    return {n: p for n, p in whole(model).items() if "lora" in n}


def test_the_adapter_is_written_whole_by_one_rank(tiny_folder, tmp_path):
    expected = run_ranks(save_from_ranks, 2, tiny_folder, tmp_path / "a")[0]
    found = load_file(tmp_path / "a/adapter_model.safetensors")
    assert found.keys() == {f"base_model.model.{name}" for name in expected}
    for name, value in expected.items():
        assert torch.equal(found[f"base_model.model.{name}"], value)
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def failing_task(mesh):
    def task():
        raise PermissionError("the disk is read-only")

    try:
        on_rank_zero(task)
    except UserError as error:
        return str(error)


def test_what_fails_on_rank_zero_fails_everywhere():
    assert run_ranks(failing_task, 2) == ["the disk is read-only"] * 2
