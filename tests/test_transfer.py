"""Nothing in a step waits for the device.

There is none here, so PyTorch's "meta" stands in for it: a device of which nothing can be read. `.item()`, `nonzero`,
`.cpu()` raise there by themselves; the mode below adds copies to it that a GPU would make while the host waits.
"""

from pathlib import Path

import pytest
import torch
from conftest import run_ranks, run_script
from test_matrix import build
from test_packing import documents_of
from test_train import prepared
from torch.distributed.fsdp import fully_shard
from torch.distributed.utils import _to_kwargs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import minillama.model.attention
from minillama.data.batch import collate
from minillama.data.packing import pack
from minillama.model import loss
from minillama.model.attention import BACKENDS, document_mask
from minillama.parallel.sharding import FsdpConfig, set_dtypes
from minillama.training import optim
from minillama.training.optim import CompensatedAdamW
from minillama.training.step import evaluate, train_step


class NoWaits(TorchDispatchMode):
    """Raises where a tensor is copied from the host to the device, or back, and the host waits for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.name() in ("aten::_to_copy", "aten::copy_"):
            devices = {tensor.device.type for tensor in tree_leaves((args, out)) if isinstance(tensor, torch.Tensor)}
            asynchronous = (kwargs or {}).get("non_blocking", args[2] if len(args) > 2 else False)
            assert asynchronous or len(devices) == 1, f"{function.name()} waits: {devices}"
        return out


@pytest.fixture
def meta_device(monkeypatch):
    for sizes in (loss.CHUNK_BYTES, loss.CHUNK_ROWS, loss.SLICE_BYTES, optim.PART):
        monkeypatch.setitem(sizes, "meta", sizes["cuda"])
    monkeypatch.setattr(minillama.model.attention, "_varlen", lambda: (lambda q, *_: q.clone(), True))  # a GPU's alone
    monkeypatch.setattr(minillama.model.attention, "_flex", lambda: lambda q, k, v, **_: q.clone())


def on_meta(kind, folder, attention):
    """A model on "meta" that is called as FSDP2 calls one on a GPU: with what its hook makes of the arguments."""
    model = build(kind, folder).train()
    set_dtypes(model, FsdpConfig(precision="bf16"))
    model.attention = BACKENDS[attention]
    model.register_forward_pre_hook(
        lambda _, args, kwargs: tuple(x[0] for x in _to_kwargs(args, kwargs, torch.device("meta"), False)),
        prepend=True,
        with_kwargs=True,
    )
    return model


def batches():
    packed = pack(documents_of([7, 13, 20, 5, 9, 20, 20]), 20, 0)
    return [collate(packed, packs, 0, "meta") for packs in ([0, 1], [2, 3], [])]


@pytest.mark.parametrize("attention", BACKENDS)
def test_no_step_waits(tiny_folder, meta_device, attention):
    made = batches()
    for kind in ("full", "lora", "ends", "dora", "adapter") if attention == "sdpa" else ("lora",):
        model = on_meta(kind, tiny_folder, attention)
        optimizer = CompensatedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        with NoWaits():
            total, norm = train_step(model, optimizer, made, clip_norm=1.0)
            assert total.is_meta and norm.is_meta
            assert all(p.grad is None for p in model.parameters())
            with pytest.raises((NotImplementedError, RuntimeError)):  # of all batches together, at the end
                evaluate(model, iter(made))


def test_reading_the_documents_or_labels_on_the_device_would_show(tiny_folder, meta_device):
    model, batch = on_meta("lora", tiny_folder, "sdpa"), batches()[0]
    for arguments in ({"document_ids": batch.document_ids}, {"labels": batch.labels}):
        with pytest.raises(AssertionError, match="waits"), NoWaits():  # the hook moves it
            model(batch.tokens, **arguments)
        with pytest.raises((NotImplementedError, RuntimeError), match=r"[Mm]eta"):  # and then it is read
            model(batch.tokens, **arguments)


def test_the_mask_for_flex_is_made_without_a_wait():
    with NoWaits():
        mask = document_mask([300, 1, 150, 61], torch.device("meta"))
    assert mask.kv_indices.is_meta and mask.full_q_indices.is_meta and mask.shape == (1, 1, 512, 512)


def through_the_root_hook(mesh, folder):
    """What the model's forward gets of a batch when FSDP2's hook takes this device for one that it must move tensors to."""
    model, optimizer = prepared("lora", folder, FsdpConfig(strategy="full-shard", precision="fp32"))
    packed = pack(documents_of([7, 13, 20, 5]), 20, 0)
    made = [collate(packed, [0, 1], 0, "cpu")]
    expected = train_step(model, optimizer, made)[0].item()

    model, optimizer = prepared("lora", folder, FsdpConfig(strategy="full-shard", precision="fp32"))
    torch._C._get_privateuse1_backend_name = lambda: "cpu"  # one of those that it moves to
    got = []
    model.register_forward_pre_hook(lambda _, args, kwargs: got.append(kwargs), with_kwargs=True)  # after FSDP2's
    assert train_step(model, optimizer, made)[0].item() == expected
    [kwargs] = got
    assert kwargs["labels"] is made[0].targets and kwargs["lengths"] == made[0].lengths
    assert all(type(length) is int for length in kwargs["lengths"])
    moved = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor)]
    assert moved == ["positions"]

    torch._C._get_privateuse1_backend_name = lambda: "meta"
    fully_shard.state(model)._device = torch.device("meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # it does move tensors
        model(made[0].tokens, document_ids=made[0].document_ids)


def test_fsdp2_leaves_what_is_ready_as_it_is(tiny_folder):
    run_ranks(through_the_root_hook, 1, tiny_folder)


ON_A_GPU = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from test_matrix import build
from test_packing import documents_of
from minillama.model.attention import BACKENDS
from minillama.parallel.initialise import initialise, materialise
from minillama.parallel.processes import process_group
from minillama.parallel.sharding import FsdpConfig, make_mesh, set_dtypes, shard
from minillama.formats.hf import load_weights
from minillama.training.optim import OptimConfig, make_optimizer
from minillama.data.batch import collate
from minillama.data.packing import pack
from minillama.training.step import train_step

with process_group("cuda") as device:
    fsdp = FsdpConfig(strategy="full-shard", precision={precision!r})
    model = build("lora", Path({folder!r}))
    model.attention = BACKENDS[{attention!r}]
    set_dtypes(model, fsdp)
    shard(model, make_mesh(fsdp, device), fsdp)
    materialise(model, device)
    initialise(model, 3, loaded=load_weights(model, Path({folder!r})))
    optimizer = make_optimizer(model.parameters(), OptimConfig())
    packed = pack(documents_of([7, 13, 20, 5]), 20, 0)
    for step in range(3):
        batches = [collate(packed, [pack], 0, device) for pack in range(2)]
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")  # first, much is made for the first time
        loss, norm = train_step(model, optimizer, batches, clip_norm=1.0)
        torch.cuda.set_sync_debug_mode("default")
    print("loss", loss.item(), "norm", norm.item())
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    "attention, precision", [("sdpa", "mixed"), ("math", "mixed"), ("varlen", "mixed"), ("flex", "fp32")]
)
def test_no_step_waits_on_cuda(tiny_folder, tmp_path, attention, precision):
    script = tmp_path / "step.py"
    texts = {"tests": str(Path(__file__).parent), "folder": str(tiny_folder)}
    script.write_text(ON_A_GPU.format(attention=attention, precision=precision, **texts))
    codes, text = run_script(script, log=tmp_path / "log")
    assert codes == [0] and "loss" in text, text
