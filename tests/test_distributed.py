"""Sharded training in real processes: any split gives the numbers of one process."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from conftest import random_model, run_ranks, save_folder
from safetensors.torch import load_file
from test_packing import documents_of
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.adapters.peft import save_adapter
from minillama.data.batch import collate
from minillama.data.packing import pack, pad
from minillama.errors import UserError
from minillama.formats.hf import base_parameters, from_pretrained, load_weights, read_config
from minillama.model.attention import BACKENDS
from minillama.model.llama import Llama
from minillama.model.surgery import replace_modules
from minillama.parallel.initialise import initialise, materialise
from minillama.parallel.processes import all_reduce, on_rank_zero
from minillama.parallel.sharding import FsdpConfig, choose_strategy, local, make_mesh, set_dtypes, shard
from minillama.training.optim import OptimConfig, make_optimizer
from minillama.training.plan import EvalConfig, TrainConfig, eval_batches, steps
from minillama.training.step import evaluate, train_step

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


def plain(folder):
    """The same on one process, unsharded."""
    model = apply_lora(from_pretrained(folder), LORA)
    initialise(model, 7, loaded=base_parameters(model))
    return model


def opened(model):
    """With B not zero: else A would have no gradient."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            local(parameter).data.fill_(0.1)
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
        for step in steps(packed, config, 0, dist.get_rank(), mesh.size(), config.begin(mesh.size())):
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
    model = opened(sharded(mesh, folder))
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    model(tokens[mine], labels=labels[mine]).backward()
    with torch.no_grad():
        return model(tokens, labels=labels).item(), {
            n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None
        }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_sharded_model_computes_what_the_plain_one_does(tmp_path, tied, world_size):
    folder = save_folder(random_model(tie_word_embeddings=tied), tmp_path, tie_word_embeddings=tied)
    tokens, labels = torch.randint(0, 512, (2, 2, 30))
    model = opened(plain(folder))
    expected = model(tokens, labels=labels)
    expected.backward()
    trained = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(trained) == 3 * 3 * 2
    for loss, gradients in run_ranks(loss_and_gradients, world_size, folder, tokens, labels):
        assert loss == pytest.approx(expected.item(), rel=1e-5) and gradients.keys() == trained
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-4, msg=name)


def one_step_without_labels(mesh, folder, labels_on):
    """A step in which only the ranks of labels_on have a trained token."""
    model = sharded(mesh, folder)
    optimizer = make_optimizer(model.parameters(), OptimConfig())
    documents = documents_of([20] * 2)
    documents.trained[:] = dist.get_rank() in labels_on
    packed = pad(documents, 20)
    batches = [collate(packed, packs, 0, "cpu") for packs in ([1], [])]
    loss, norm = train_step(model, optimizer, batches)
    return loss.item(), norm.item(), all(torch.isfinite(p).all().item() for p in whole(model).values())


def test_a_rank_without_a_trained_token_breaks_nothing(tiny_folder):
    model = plain(tiny_folder)
    row = torch.from_numpy(documents_of([20] * 2).tokens[20:40]).long()
    expected = nn.functional.cross_entropy(model(row[None])[0, :-1], row[1:])
    expected.backward()
    norm = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).sqrt()
    for loss, found, finite in run_ranks(one_step_without_labels, 2, tiny_folder, [1]):
        assert (loss, found) == pytest.approx((expected.item(), norm.item()), rel=1e-5) and finite
    assert run_ranks(one_step_without_labels, 2, tiny_folder, []) == [(0.0, 0.0, True)] * 2


def state_after_loading(mesh, folder):
    """Filled from NaN: what initialise or load_weights leave out shows."""
    fsdp = FsdpConfig(precision="mixed")
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
def test_loading_and_initialising_fill_the_same_values_on_any_number_of_ranks(tmp_path, tied):
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


def memory(mesh, folder, strategy):
    """Shares of parameters, gradients and optimizer state held here; gathered bytes of each block after the forward."""
    fsdp = FsdpConfig(strategy=strategy, precision="fp32")
    with torch.device("meta"):
        model = Llama(read_config(folder))
    shard(model, make_mesh(fsdp, "cpu"), fsdp)
    materialise(model, "cpu")
    initialise(model, 7, load_weights(model, folder))
    optimizer = make_optimizer(model.parameters(), OptimConfig())
    gathered = []
    for block in model.model.layers:
        block.self_attn.register_forward_pre_hook(
            lambda _, args, block=block: gathered.append([p.untyped_storage() for p in block.parameters()])
        )
    loss = model(torch.arange(20)[None], labels=torch.arange(20)[None])
    during = [sum(storage.nbytes() for storage in block) for block in gathered]
    loss.backward()
    after = [sum(storage.nbytes() for storage in block) for block in gathered]
    optimizer.step()
    numel = sum(p.numel() for p in model.parameters())
    shares = [
        sum(local(p).numel() for p in model.parameters()) / numel,
        sum(local(p.grad).numel() for p in model.parameters()) / numel,
        sum(local(state[key]).numel() for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
        / numel,
    ]
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    return shares, [n / block for n in during], [n / block for n in after]


@pytest.mark.parametrize(
    ("strategy", "share", "kept"), [("full-shard", 0.5, 0), ("shard-grad-op", 0.5, 1), ("no-shard", 1, 1)]
)
def test_each_rank_holds_its_share_and_frees_what_it_gathered(tiny_folder, strategy, share, kept):
    for shares, during, after in run_ranks(memory, 2, tiny_folder, strategy):
        assert shares == pytest.approx([share, share, 2 * share], abs=0.02)
        assert during == [kept] * 3 and after == [0] * 3


def replicated_base(mesh, folder):
    """Under no-shard the frozen base is neither copied nor wrapped."""
    fsdp = FsdpConfig(strategy="no-shard", precision="mixed")
    model = sharded(make_mesh(fsdp, "cpu"), folder, fsdp)
    pointers = {n: p.data_ptr() for n, p in model.named_parameters() if not p.requires_grad}
    assert not any(isinstance(model.get_parameter(n), DTensor) for n in pointers)
    used = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.register_forward_pre_hook(lambda m, _, name=name: used.update({f"{name}.weight": m.weight}))
    model(torch.arange(20)[None], labels=torch.arange(20)[None]).backward()
    assert used and all(weight.data_ptr() == pointers[name] for name, weight in used.items())


def test_no_shard_leaves_a_frozen_base_alone(tiny_folder):
    run_ranks(replicated_base, 2, tiny_folder)


def impossible_meshes(mesh):
    for local_sizes in ("2211", None):  # machines with 2, 1 and 1 processes; a launcher that does not say
        os.environ["LOCAL_WORLD_SIZE"] = (local_sizes or "2222")[dist.get_rank()]
        if local_sizes is None:
            del os.environ["LOCAL_WORLD_SIZE"]
        with pytest.raises(UserError, match=r"--fsdp\.shard-size must be given"):
            make_mesh(FsdpConfig(strategy="hybrid-shard"), "cpu")
    for size, world in ((3, 4), (8, 4)):
        with pytest.raises(UserError, match=rf"--fsdp\.shard-size {size} does not divide the {world} processes"):
            make_mesh(FsdpConfig(strategy="hybrid-shard", shard_size=size), "cpu")
    two = make_mesh(FsdpConfig(strategy="hybrid-shard", shard_size=2, timeout_minutes=0.5), "cpu")
    timeouts = {g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in two.get_all_groups()}
    assert timeouts == {30}
    assert two.mesh_dim_names == ("replicate", "shard") and two.mesh.tolist() == [[0, 1], [2, 3]]


def test_the_sizes_of_a_hybrid_mesh_are_checked():
    run_ranks(impossible_meshes, 4)
    with pytest.raises(UserError, match=r"is for --fsdp\.strategy hybrid-shard"):
        FsdpConfig(strategy="full-shard", shard_size=2)


def chosen(mesh, folder, memory):
    os.sysconf = lambda name: memory if name == "SC_PHYS_PAGES" else 1  # bytes
    result = []
    for trained, offload in ((False, False), (True, False), (False, True)):
        with torch.device("meta"):
            model = Llama(read_config(folder)).requires_grad_(trained)
        apply_lora(model, LORA)
        set_dtypes(model, FP32)
        result.append(choose_strategy(model, FsdpConfig(cpu_offload=offload), "cpu").strategy)
    return result


def test_auto_replicates_a_frozen_base_that_fits(tiny_folder):
    frozen = 4 * sum(p.numel() for p in random_model().parameters())
    trained = 4 * sum(p.numel() for p in apply_lora(random_model(), LORA).parameters()) - frozen
    size = int(frozen + 4.5 * trained)
    assert run_ranks(chosen, 2, tiny_folder, 4 * size)[0] == ["no-shard", "full-shard", "full-shard"]
    assert run_ranks(chosen, 2, tiny_folder, 4 * size - 8)[0] == ["full-shard"] * 3


def block_runs(mesh, folder, attention, recompute):
    """How often each block's attention, its kernel and its matrix products run in a forward and its backward."""
    model = sharded(mesh, folder, FsdpConfig(precision="fp32", recompute=recompute))
    model.attention = BACKENDS[attention]
    runs = [0] * len(model.model.layers)

    def count(i):
        runs[i] += 1

    for i, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(lambda *_, i=i: count(i))
    with Counting() as counted:
        loss = model(torch.arange(20)[None], labels=torch.arange(20)[None])
        forward = dict(counted.calls)
        loss.backward()
    return runs, forward, counted.calls


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = {"mm": 0, "attention": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        self.calls["mm"] += name == "aten::mm"
        kernel = "scaled_dot_product" in name or "blockwise_attention" in name
        self.calls["attention"] += kernel and "backward" not in name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("world_size", "attention"), [(1, "math"), (2, "sdpa")])
def test_recompute_runs_each_block_exactly_twice(tiny_folder, world_size, attention):
    (runs, forward, none), *_ = run_ranks(block_runs, world_size, tiny_folder, attention, "none")
    assert runs == [1] * 3 and none["attention"] == 3
    (runs, same, full), *_ = run_ranks(block_runs, world_size, tiny_folder, attention, "full")
    assert runs == [2] * 3 and full["attention"] == 6 and same == forward
    (runs, same, selective), *_ = run_ranks(block_runs, world_size, tiny_folder, attention, "selective")
    assert runs == [2] * 3 and selective["attention"] == 3 and same == forward
    # An adapted block has 13 products. Nothing needs the last one's result, so it does not run again; of the other 12
    # those of v, o and up are kept.
    assert full["mm"] - none["mm"] == 3 * 12 and selective["mm"] - none["mm"] == 3 * 9


def random_base(mesh, folder):
    fsdp = FsdpConfig(precision="fp32")
    with torch.device("meta"):
        model = Llama(read_config(folder))
    shard(model, mesh, fsdp)
    materialise(model, "cpu")
    for parameter in model.parameters():
        local(parameter).data.fill_(torch.nan)
    initialise(model, 7)
    drawn = whole(model)
    initialise(model, 8)
    others = whole(model)
    return drawn, [name for name, value in drawn.items() if torch.equal(value, others[name])]


def test_without_weights_all_ranks_draw_the_same(tiny_folder):
    [(one, same)] = run_ranks(random_base, 1, tiny_folder)
    (first, _), (second, _) = run_ranks(random_base, 2, tiny_folder)
    assert same == [name for name in one if "norm" in name]  # ones, whatever the seed
    for name, value in one.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, first[name]) and torch.equal(value, second[name])


class Owning(nn.Module):
    """A projection with all that a fork's module may own: a parameter, buffers that are saved and not, packed integers."""

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight
        self.scale = nn.Parameter(torch.empty(linear.out_features, device="meta"))
        packed = torch.empty(linear.out_features, 3, dtype=torch.uint8, device="meta")
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("drawn", torch.empty(5, device="meta"))
        self.register_buffer("table", torch.empty(4, device="meta"), persistent=False)
        self.register_buffer("count", torch.empty((), dtype=torch.int64, device="meta"))

    def reset_parameters(self):
        nn.init.normal_(self.weight)
        nn.init.normal_(self.scale)
        nn.init.normal_(self.drawn)
        self.packed.random_(0, 255)
        self.table = torch.arange(4.0)  # instead of the one it has
        self.count.fill_(7)

    def forward(self, x):
        return nn.functional.linear(x, self.weight) * self.scale


class Fork(Llama):
    """A model that owns something itself, which no base has."""

    def add(self):
        self.temperature = nn.Parameter(torch.empty(6, device="meta"))
        self.register_buffer("seen", torch.empty(2, 2, device="meta"))

    def reset_parameters(self):
        nn.init.normal_(self.temperature)
        nn.init.constant_(self.seen, 3.0)


def fork(folder, fsdp):
    with torch.device("meta"):
        model = Fork(read_config(folder)).requires_grad_(False)
    model.add()
    replace_modules(model, lambda name, _: name.endswith("up_proj"), Owning)
    set_dtypes(model, fsdp)
    return model


def everything(mesh, folder, strategy):
    """What a fork's parameters and buffers are after loading and initialising, from NaN and 255."""
    fsdp = FsdpConfig(strategy=strategy or "full-shard", precision="mixed")
    model = fork(folder, fsdp)
    if strategy:
        shard(model, make_mesh(fsdp, "cpu"), fsdp)
    materialise(model, "cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        local(tensor).data.fill_(torch.nan if tensor.is_floating_point() else 255)
    initialise(model, 7, load_weights(model, folder))
    return whole(model) | dict(model.named_buffers())


def test_all_that_any_module_owns_is_filled_the_same_sharded_or_not(tiny_folder):
    (expected,) = run_ranks(everything, 1, tiny_folder, None)
    base = {n: p for n, p in random_model().named_parameters()}
    assert len(expected) == len(base) + 3 * 5 + 2
    for name, value in expected.items():
        assert value.isfinite().all(), name
        if name in base:
            assert torch.equal(value, base[name].bfloat16())
    one = {name.rpartition(".")[2]: value for name, value in expected.items() if "layers.0.mlp.up_proj" in name}
    assert torch.equal(one["table"], torch.arange(4.0)) and one["count"] == 7
    assert one["packed"].dtype == torch.uint8 and 0 < one["packed"].float().mean() < 255
    assert torch.equal(expected["seen"], torch.full((2, 2), 3.0)) and expected["temperature"].dtype == torch.float32
    drawn = [value for name, value in expected.items() if name.endswith(("drawn", "temperature"))]
    assert len({value[0].item() for value in drawn}) == 4
    if torch.__version__ < "2.12":
        pytest.skip("FSDP2 of PyTorch 2.11 takes no parameters of integers")
    for strategy in ("full-shard", "no-shard"):
        for found in run_ranks(everything, 2, tiny_folder, strategy):
            assert found.keys() == expected.keys()
            assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_module_that_does_not_fill_what_it_owns_is_named(tiny_folder):
    model = fork(tiny_folder, FP32).to_empty(device="cpu")
    model.model.norm.register_buffer("shift", torch.zeros(2))
    with pytest.raises(UserError, match=r"model\.norm \(RMSNorm\): its reset_parameters\(\) does not fill shift"):
        initialise(model, 7)
    norm, fill = model.model.norm, model.model.norm.reset_parameters
    norm.reset_parameters = lambda: (fill(), norm.shift[:1].zero_())  # the first of two numbers
    with pytest.raises(UserError, match=r"model\.norm \(RMSNorm\): its reset_parameters\(\) does not fill shift"):
        initialise(model, 7)
    model = fork(tiny_folder, FP32).to_empty(device="cpu")
    model.model.register_parameter("bias", nn.Parameter(torch.zeros(2)))
    with pytest.raises(UserError, match=r"model \(LlamaModel\) owns bias, but has no reset_parameters\(\)"):
        initialise(model, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_numbers_of_fp32_rounded(tiny_folder, dtype):
    drawn = []
    for of in (torch.float32, dtype):
        with torch.device("meta"):
            model = Llama(read_config(tiny_folder))
        apply_lora(model, LORA)
        apply_llama_adapter(model, LlamaAdapterConfig(5, 2))
        initialise(model.to(of).to_empty(device="cpu"), 7)
        drawn.append(dict(model.named_parameters()))
    for name, parameter in drawn[1].items():
        assert parameter.dtype == dtype and torch.equal(parameter, drawn[0][name].to(dtype)), name


def save_after_evaluation(mesh, folder, out):
    """Without resharding after the forward, which leaves bf16 copies where the fp32 masters should be looked for."""
    with torch.device("meta"):
        model = Llama(read_config(folder)).requires_grad_(False)
    apply_lora(model, LORA)
    set_dtypes(model, FsdpConfig(precision="mixed"))
    shard(model, mesh, FsdpConfig(strategy="shard-grad-op", precision="mixed"))
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


def test_numbers_of_all_ranks_are_exact():
    """Tokens are counted in them."""
    numbers = [2.0**53 - 1, 0.1, -3.0]
    assert all_reduce(numbers) == all_reduce(numbers, "max") == numbers
    assert run_ranks(sums, 2) == [([2.0**53 - 1, 6.0], [2.0**52, 4.0])] * 2


def sums(mesh):
    numbers = [2.0**52 - dist.get_rank(), 2.0 + 2 * dist.get_rank()]
    return all_reduce(numbers), all_reduce(numbers, "max")


def failing_task(mesh):
    def task():
        raise PermissionError("the disk is read-only")

    try:
        on_rank_zero(task)
    except UserError as error:
        return str(error)


def test_what_fails_on_rank_zero_fails_everywhere():
    assert run_ranks(failing_task, 2) == ["the disk is read-only"] * 2
