"""Which kernels a run gets; compiled blocks against eager ones.

The suite goes without the slowest part, the C++ compiler; `pytest tests/test_kernels.py --whole-matrix` does all of it.
"""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import random_model, run_ranks
from test_matrix import build

from minillama.errors import UserError
from minillama.formats.hf import load_weights
from minillama.hardware import benchmark
from minillama.hardware.kernels import KernelsConfig, choose_kernels, compile_blocks
from minillama.model.attention import BACKENDS
from minillama.parallel.initialise import initialise, materialise
from minillama.parallel.sharding import FsdpConfig, make_mesh, set_dtypes, shard
from minillama.training.resume import Checkpoint


def chosen(device, dtype, **config):
    model = random_model()
    return choose_kernels(model, KernelsConfig(**config), dtype, device), model.attention


@pytest.mark.parametrize("faster, slower", [("math", "sdpa"), ("sdpa", "math")])
def test_auto_takes_what_is_measured_to_be_faster(monkeypatch, tmp_path, faster, slower):
    seconds = iter([0.01, 0.02] if faster == "math" else [0.02, 0.01])  # math is measured first
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(benchmark, "fastest", lambda call: next(seconds))
    said = f"{faster} (auto: 51,200 tokens/s a core, {slower} 25,600)"
    for _ in range(2):  # the second time from the file
        name, attention = chosen("cpu", torch.float32)
        assert (name, attention) == (said, BACKENDS[faster])


def test_auto_without_a_choice(monkeypatch):
    assert chosen("cpu", torch.float32, compile=True)[0] == "math (auto: compiled on CPU)"
    assert chosen("cpu", torch.float32, attention="math")[0] == "math"
    for capability, dtype, wanted in [
        ((9, 0), torch.bfloat16, "varlen (auto: half precision on CUDA)"),
        ((9, 0), torch.float32, "flex (auto: float32 on CUDA)"),
        ((7, 5), torch.float16, "flex (auto: float16 on CUDA)"),
        ((7, 5), torch.bfloat16, "math (auto: compute capability 7.5)"),
        ((6, 1), torch.float32, "math (auto: compute capability 6.1)"),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        name, attention = chosen("cuda", dtype)
        assert (name, attention) == (wanted, BACKENDS[wanted.split()[0]])


def test_auto_keeps_the_attention_of_a_checkpoint_where_it_can_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for device, dtype, saved, compiled, kept in [
        ("cpu", torch.float32, "sdpa", False, True),
        ("cpu", torch.float32, "math", False, True),
        ("cpu", torch.float32, "sdpa", True, False),
        ("cpu", torch.float32, "varlen", True, False),
        ("cuda", torch.bfloat16, "math", False, True),
        ("cuda", torch.bfloat16, "varlen", True, True),
        ("cuda", torch.float32, "varlen", False, False),
    ]:
        model = random_model()
        said = choose_kernels(model, KernelsConfig(compile=compiled), dtype, device, saved=saved)
        assert (said == f"{saved} (auto: the checkpoint's)") == (model.attention is BACKENDS[saved]) == kept


def test_a_run_that_goes_on_from_another_kind_of_device_takes_the_attention_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for device, said in (("cpu", "flex (auto: float32 on CUDA)"), ("cuda", "math (auto: the checkpoint's)")):
        checkpoint = Checkpoint(Path("step-00000001"), {"device": device, "attention": "math"})
        saved = checkpoint.attention("cuda")
        assert choose_kernels(random_model(), KernelsConfig(), torch.float32, "cuda", saved=saved) == said


@pytest.mark.parametrize(
    "device, config, message",
    [
        ("cpu", {"attention": "varlen"}, "varlen cannot train on a CPU"),
        ("cpu", {"attention": "flex"}, "flex cannot train on a CPU"),
        ("cuda", {"attention": "varlen"}, "varlen needs bf16 or fp16"),
        ("cuda", {"attention": "flash"}, "flash needs bf16 or fp16"),
        ("cpu", {"attention": "sdpa", "compile": True}, "sdpa has a call for each document"),
        ("cpu", {"attention": "flash", "compile": True}, "flash has a call for each document"),
    ],
)
def test_what_cannot_run_is_an_error(device, config, message):
    with pytest.raises(UserError, match=message):
        chosen(device, torch.float32, **config)


def test_no_compiler_is_an_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        chosen("cpu", torch.float32, compile=True)


KINDS = {"full": 1, "lora": 2, "adapter": 3}
"""With how many kinds of blocks: below the first that trains, with and without gradient of its input."""


def train(mesh, folder, kind, recompute, precision, compiled, backend):
    """(loss, gradients) of each batch, and how many times something was compiled."""
    from torch._dynamo.utils import counters

    counters.clear()
    torch._dynamo.reset()
    fsdp = FsdpConfig(precision=precision, recompute=recompute, strategy="full-shard")
    model = build(kind, folder)
    set_dtypes(model, fsdp)
    choose_kernels(model, KernelsConfig(attention="math", compile=compiled), fsdp.compute_dtype, "cpu")
    shard(model, make_mesh(fsdp, "cpu"), fsdp)
    if compiled:
        compile_blocks(model)
    materialise(model, "cpu")
    initialise(model, 3, loaded=load_weights(model, folder))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "gate" in name.rpartition("adaption_")[2]:
            torch.nn.init.constant_(parameter, 0.1)
    numbers = []
    random = torch.Generator().manual_seed(dist.get_rank())
    torch.compiler.set_stance(force_backend=backend)
    for shape, documents in (((2, 40), 3), ((2, 40), 7), ((3, 37), 5), ((2, 21), 2)):
        ids = torch.randint(0, documents, shape, generator=random).sort(dim=1)[0]
        tokens = torch.randint(0, 500, shape, generator=random)
        loss = model(tokens, document_ids=ids, labels=tokens)
        loss.backward()
        gradients = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
        numbers.append((loss.item(), torch.cat([g.flatten() for g in gradients])))
        model.zero_grad()
    return numbers, counters["frames"]["total"]


def compare(folder, world_size, kind, recompute, precision, backend="inductor"):
    """Compiled blocks are about as near to the fp32 gradient as eager ones, and in fp32 nearly equal."""
    runs = [("fp32", False), (precision, False), (precision, True)]
    exact, eager, compiled = (
        run_ranks(train, world_size, folder, kind, recompute, dtype, compiled, backend) for dtype, compiled in runs
    )
    for rank in range(world_size):
        assert compiled[rank][1] == KINDS[kind] and eager[rank][1] == 0
        error = usual_error = 0.0  # of all batches: of one, bf16's is a matter of luck
        for numbers in zip(exact[rank][0], eager[rank][0], compiled[rank][0], strict=True):
            (loss, gradient), (_, usual), (our_loss, ours) = numbers
            assert our_loss == pytest.approx(loss, rel=1e-5 if precision == "fp32" else 1e-3)
            error += ((ours - gradient).norm() / gradient.norm()).item() ** 2
            usual_error += ((usual - gradient).norm() / gradient.norm()).item() ** 2
        assert error < max(4 * usual_error, 1e-10)


def test_compiled_once_for_all_blocks_and_packs_it_computes_the_same(tiny_folder):
    compare(tiny_folder, 2, "full", "selective", "fp32")


@pytest.mark.parametrize("precision", ["fp32", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled(tiny_folder, kind, precision, request):
    if not request.config.getoption("--whole-matrix"):
        pytest.skip("compiles for minutes")
    for world_size, recompute in itertools.product((1, 2), ("none", "full", "selective")):
        compare(tiny_folder, world_size, kind, recompute, precision)
