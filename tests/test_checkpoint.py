"""Checkpoints: what is saved is what is loaded, whole or not at all, whatever happens to the files or the processes."""

import errno
import json
import os
import re
import resource
import shutil
import signal
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import _call_with_mesh, _processes, run_ranks
from safetensors.torch import load_file, save_file
from test_packing import documents_of
from torch.distributed.tensor import DTensor

import minillama.training.checkpoint as checkpoint_module
import minillama.training.resume as resume_module
from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.data.batch import collate
from minillama.data.packing import pack
from minillama.errors import UserError
from minillama.formats.hf import load_weights, read_config
from minillama.model.llama import Llama
from minillama.parallel.initialise import initialise, materialise
from minillama.parallel.sharding import FsdpConfig, make_mesh, set_dtypes, shard
from minillama.training.checkpoint import CheckpointConfig, Checkpoints
from minillama.training.config import RunConfig
from minillama.training.optim import LossScaler, OptimConfig, make_optimizer
from minillama.training.plan import Progress, Step
from minillama.training.resume import MANIFEST, Checkpoint, find_checkpoint, hash_of
from minillama.training.step import train_step

SYNC = CheckpointConfig(async_save=False, keep=0)
LORA = LoraConfig(dropout=0.1, targets=("q_proj", "down_proj"))


@dataclass
class Training:
    """A small model in training, and its checkpoints in `out`."""

    model: Llama
    optimizer: torch.optim.Optimizer
    config: RunConfig
    scaler: LossScaler = field(default_factory=LossScaler)

    def checkpoints(self, resumed=None):
        flags = json.loads(json.dumps(asdict(self.config), default=str))
        return Checkpoints(
            self.config.output_dir,
            self.config.checkpoint,
            self.model,
            self.optimizer,
            self.scaler,
            "cpu",
            packs_per_step=2,
            about={"flags": flags, "fingerprints": {"model": "m", "data": "d"}},
            resume_from=resumed,
            seed=self.config.seed,
        )

    def step(self, seed=0):
        packed = pack(documents_of([20] * 4, seed), 20, 0)
        loss, _ = train_step(self.model, self.optimizer, [collate(packed, [dist.get_rank()], 0, "cpu")])
        return loss.item()

    def state(self, checkpoints):
        """All that trains, whole."""
        parts = checkpoints._state(optimizer=True)
        return {
            f"{part} {name}": (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }


def training(folder, out, fsdp=None, kind="adamw", checkpoint=SYNC, seed=0, rank=8, norm=True):
    fsdp = fsdp or FsdpConfig(strategy="full-shard", precision="fp32")
    with torch.device("meta"):
        model = Llama(read_config(folder)).requires_grad_(False)
        model.model.norm.requires_grad_(norm)
    apply_lora(model, replace(LORA, rank=rank))
    set_dtypes(model, fsdp)
    shard(model, make_mesh(fsdp, "cpu"), fsdp)
    materialise(model, "cpu")
    initialise(model, seed, loaded=load_weights(model, folder))
    optimizer = make_optimizer(model.parameters(), OptimConfig(lr=1e-2, kind=kind))
    torch.manual_seed(seed + dist.get_rank())
    return Training(model.train(), optimizer, RunConfig(folder, out, fsdp=fsdp, checkpoint=checkpoint))


def found(out, step=None):
    resume = "auto" if step is None else str(out / f"checkpoints/step-{step:08}")
    return find_checkpoint(resume, out)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def small_files():
    before, checkpoint_module.MAX_FILE_BYTES = checkpoint_module.MAX_FILE_BYTES, 5000
    yield
    checkpoint_module.MAX_FILE_BYTES = before


# (precision, optimizer, strategy, format)
KINDS = [
    ("fp32", "adamw", "full-shard", "sharded"),
    ("bf16", "anyprecision", "no-shard", "sharded"),
    ("bf16", "adamw", "full-shard", "full"),
]


def parts_of(kind, out, checkpoint_format=None):
    precision, optimizer, strategy, saved_as = kind
    config = CheckpointConfig(async_save=False, format=saved_as)
    return {"fsdp": FsdpConfig(strategy=strategy, precision=precision), "kind": optimizer, "checkpoint": config}


def save_some(mesh, folder, out):
    """Saves after two steps, once in each kind; what was saved, and the random numbers and losses that follow."""
    results = []
    with small_files():
        for number, kind in enumerate(KINDS):
            run = training(folder, out / str(number), **parts_of(kind, out))
            with run.checkpoints() as checkpoints:
                run.step(), run.step()
                run.scaler.scale = 123.0
                checkpoints.best = (1.5, 1)
                checkpoints.save(Progress(packs_per_step=2, step=2, epoch=1, cursor=3, tokens=5, evaluate=False))
                saved = run.state(checkpoints)
                results.append((saved, torch.rand(3), [run.step(), run.step()], run.state(checkpoints)))
    return results


def load_some(mesh, folder, out):
    results = []
    for number, kind in enumerate(KINDS):
        resumed = found(out / str(number))
        assert resumed.progress == Progress(packs_per_step=2, step=2, epoch=1, cursor=3, tokens=5, evaluate=False)
        run = training(folder, out / str(number), **parts_of(kind, out), seed=9)
        with run.checkpoints(resumed) as checkpoints:
            assert run.scaler.scale == 123.0 and checkpoints.best == (1.5, 1)
            loaded = run.state(checkpoints)
            results.append((loaded, torch.rand(3), [run.step(), run.step()], run.state(checkpoints)))
    return results


def save_and_load_copies(mesh, folder, out):
    fsdp, config = (
        FsdpConfig(strategy="hybrid-shard", shard_size=2, precision="fp32"),
        CheckpointConfig(async_save=False),
    )
    run = training(folder, out, fsdp, checkpoint=config)
    with run.checkpoints() as checkpoints:
        checkpoints.save(Progress(packs_per_step=4, step=2))
        saved = run.state(checkpoints)
    run = training(folder, out, fsdp, checkpoint=config, seed=9)
    with run.checkpoints(found(out)) as checkpoints:
        return equal(run.state(checkpoints), saved)


def test_copies_of_the_model_share_the_writing(tiny_folder, tmp_path):
    assert run_ranks(save_and_load_copies, 4, tiny_folder, tmp_path) == [True] * 4
    index = json.loads((tmp_path / "checkpoints/step-00000002/index.json").read_text())
    files = [part[2] for name, entry in index.items() if name.startswith("model.") for part in entry["parts"]]
    assert len({*files}) == 4 and len(files) < 2 * len(index)  # each row once: or the index would have been refused


def draw_on_other_ranks(mesh, folder, out):
    """The first random number of runs that go on where other numbers of ranks stopped."""
    resumed, drawn = found(out / "0"), []
    for seed, step in ((42, 2), (42, 3), (43, 2), (42, 2)):
        progress = resumed.content["progress"] | {"step": step}
        other = Checkpoint(resumed.folder, resumed.content | {"world_size": 4, "progress": progress})
        run = training(folder, out / "0", **parts_of(KINDS[0], out))
        run.config = replace(run.config, seed=seed)
        with run.checkpoints(other):
            drawn.append(torch.rand(1).item())
    return drawn


def test_what_is_loaded_is_what_was_saved(tiny_folder, tmp_path):
    saved = run_ranks(save_some, 2, tiny_folder, tmp_path)
    for ranks in (1, 2):
        for rank, loaded in enumerate(run_ranks(load_some, ranks, tiny_folder, tmp_path)):
            for kind, one, other in zip(KINDS, saved[rank], loaded, strict=True):
                assert any(t.dtype == torch.bfloat16 for t in one[0].values()) == (kind[0] == "bf16")
                assert equal(one[0], other[0]), kind
                same = torch.equal(one[1], other[1]), one[2] == other[2], equal(one[3], other[3])
                assert same == (ranks == 2,) * 3, kind  # other ranks take other samples here, and draw other numbers
    assert not torch.equal(saved[0][0][1], saved[1][0][1])  # each rank draws its own
    one, two = run_ranks(draw_on_other_ranks, 2, tiny_folder, tmp_path)
    assert one[0] == one[3] and two[0] == two[3] and len({*one, *two}) == 6  # by seed, step and rank

    files = sorted((tmp_path / "2/checkpoints/step-00000002").rglob("*.safetensors"))
    assert {file.parent.name for file in files} == {"model", "optimizer", "random"} and len(files) > 10
    alone = {f"{file.parent.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}
    random = {name: alone.pop(name) for name in list(alone) if name.startswith("random")}
    assert equal(alone, saved[0][2][0]) and sorted(random) == ["random 0.cpu", "random 1.cpu"]


def save_or_not(mesh, folder, out):
    """The losses with and without saving; what async wrote while the weights changed; what its error does."""
    results = {}
    for name, checkpoint in {"none": None, "sync": SYNC, "async": CheckpointConfig(keep=0)}.items():
        run = training(folder, out / name, checkpoint=checkpoint or SYNC)
        with run.checkpoints() as checkpoints:
            losses, saved = [], []
            for number in range(4):
                losses.append(run.step(number))
                if checkpoint:
                    checkpoints.save(Progress(packs_per_step=2, step=number))
                    saved.append(run.state(checkpoints))
            results[name] = losses, run.state(checkpoints)
        for number, state in enumerate(saved):
            fresh = training(folder, out / name, seed=5)
            with fresh.checkpoints(found(out / name, number)) as checkpoints:
                assert equal(fresh.state(checkpoints), state), (name, number)
    (out / "file").mkdir(exist_ok=True)
    (out / "file/checkpoints").write_text("in the way")
    run = training(folder, out / "file", checkpoint=CheckpointConfig())
    said = []
    message = r"step-00000001, of 0\.\d+ MB, cannot be written: .*Not a directory"
    with pytest.raises(UserError, match=message), run.checkpoints() as checkpoints:
        checkpoints.save(Progress(packs_per_step=2, step=1))
        while not checkpoints.stopping():
            said.append(run.step())
    return results["none"], results["sync"], results["async"]


def test_saving_changes_nothing_and_a_failed_save_is_said(tiny_folder, tmp_path):
    for none, sync, asynchronous in run_ranks(save_or_not, 2, tiny_folder, tmp_path):
        assert none[0] == sync[0] == asynchronous[0] and equal(none[1], sync[1]) and equal(none[1], asynchronous[1])


def keep_some(mesh, folder, out):
    names = {}
    run = training(folder, out, checkpoint=CheckpointConfig(keep=2, best=True))
    (out / "checkpoints/step-00000007.partial").mkdir(parents=True)
    (out / "checkpoints/step-00000007.deleted").mkdir()
    assert found(out) is None
    with run.checkpoints() as checkpoints:
        names["start"] = sorted(path.name for path in (out / "checkpoints").iterdir())
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, 2.0)):
            checkpoints.best = min(checkpoints.best or (9.0, 0), (loss, step))
            checkpoints.save(Progress(packs_per_step=2, step=step))
    names["end"] = sorted(path.name for path in (out / "checkpoints").iterdir())
    return names


def test_the_newest_and_the_best_stay(tiny_folder, tmp_path):
    [names] = run_ranks(keep_some, 1, tiny_folder, tmp_path)
    assert names == {"start": [], "end": ["step-00000002", "step-00000004", "step-00000005"]}


def test_when_a_checkpoint_is_due():
    made = [Step(n, n // 4, n % 4 + 1, 0, n % 4 == 3, n == 9, []) for n in range(10)]
    due = {every: [s.number + 1 for s in made if CheckpointConfig(every=every).due(s)] for every in (0, 3, -1)}
    assert due == {0: [4, 8, 10], 3: [3, 6, 9, 10], -1: []}
    for name, wrong in (("every", -2), ("keep", -1)):
        with pytest.raises(UserError, match=rf"--checkpoint\.{name} {wrong}: must be at least 1"):
            CheckpointConfig(**{name: wrong})


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def make_two(mesh, folder, out, **settings):
    for saved_as in ("sharded", "full"):
        checkpoint = CheckpointConfig(async_save=False, format=saved_as)
        run = training(folder, out / saved_as, checkpoint=checkpoint, **settings)
        with run.checkpoints() as checkpoints:
            checkpoints.save(Progress(packs_per_step=2, step=1))
            run.step()
            checkpoints.save(Progress(packs_per_step=2, step=2))


def damage(folder, random):
    """One of the ways in which files go wrong; what happened to which."""
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    name = files[random.integers(len(files))]
    file, way = folder / name, ["cut", "flip", "missing", "empty", "swapped", "grown", "edited"][random.integers(7)]
    content = bytearray(file.read_bytes())
    if way == "cut":
        del content[random.integers(len(content)) :]
    elif way == "flip":
        content[random.integers(len(content))] ^= 1 << int(random.integers(8))
    elif way == "empty":
        content.clear()
    elif way == "grown":
        content += b"\0"
    elif way == "swapped":
        other = (folder.with_name("step-00000001") / name).read_bytes()
        way, content = ("swapped", bytearray(other)) if other != content else ("grown", content + b"\0")
    elif way == "edited":
        name, file = MANIFEST, folder / MANIFEST
        content = bytearray(file.read_bytes().replace(b'"step": 2', b'"step": 3'))
    file.unlink() if way == "missing" else file.write_bytes(content)
    return way, name


def find_damaged(mesh, out):
    resume_module.WAITS = ()
    ways = set()
    for seed in range(100):
        random = np.random.default_rng(seed)
        run = out / f"{seed}"
        shutil.copytree(out / ("sharded", "full")[seed % 2], run)
        newest = run / "checkpoints/step-00000002"
        way, name = damage(newest, random)
        ways.add((way, name.partition("/")[0]))
        with pytest.raises(UserError) as refused:
            found(run, 2)
        assert "step-00000002: " in str(refused.value) and (name in str(refused.value) or way == "swapped")
        sound = found(run)  # auto
        assert sound.progress.step == 1 and not newest.exists() and newest.with_suffix(".damaged").exists()
        shutil.rmtree(sound.folder / "random", ignore_errors=True)
        (sound.folder / ".metadata").unlink(missing_ok=True)
        with pytest.raises(UserError, match=r"no checkpoint of .* is sound: step-00000001: .* is missing"):
            found(run)
        assert sound.folder.exists()  # the last ones are not renamed: the next start must not start from scratch
        shutil.rmtree(run)
    return ways


def test_a_hundred_damaged_checkpoints_are_refused_by_name(tiny_folder, tmp_path):
    run_ranks(make_two, 2, tiny_folder, tmp_path)
    [ways] = run_ranks(find_damaged, 1, tmp_path)
    assert {way for way, _ in ways} == {"cut", "flip", "missing", "empty", "swapped", "grown", "edited"}
    assert {MANIFEST, ".metadata", "__0_0.distcp", "__1_0.distcp", "model", "optimizer", "random"} <= {
        name for _, name in ways
    }


def find_what_none_sees_for_a_while(mesh, out):
    """As where all ranks are on another machine than the one that wrote."""
    resume_module.WAITS = (0, 0)
    newest = out / "sharded/checkpoints/step-00000002"
    real = resume_module._unseen
    for hidden in (MANIFEST, "__0_0.distcp"):
        tries = []

        def late(file, hidden=hidden, tries=tries):
            tries.extend([file.name] if file.name == hidden else ())
            return resume_module.ABSENT if file.name == hidden and len(tries) < 3 else real(file)

        resume_module._unseen = late
        assert found(out / "sharded").folder == newest and len(tries) == 3
    return newest.exists()


def find_on_a_slow_disk(mesh, out):
    """A disk that machines share, which rank 1 does not see, or cannot read, for a while or for ever."""
    resume_module.WAITS = (0, 0, 0)
    real = resume_module._unseen, resume_module.described
    said = {}
    for name, what, failures in (
        ("seen late", "_unseen", 2),
        ("never seen", "_unseen", 10**9),
        ("read late", "described", 2),
        ("never read", "described", 10**9),
    ):
        left, function = failures, real[what == "described"]

        def failing(file, function=function, what=what):
            nonlocal left
            if dist.get_rank() == 1 and left > 0 and (what == "described" or file.name == "index.json"):
                left -= 1
                if what == "_unseen":
                    return resume_module.ABSENT
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(file))
            return function(file)

        setattr(resume_module, what, failing)
        try:
            said[name] = found(out / "sharded").progress.step
        except UserError as error:
            said[name] = str(error)
        resume_module._unseen, resume_module.described = real
        assert dist.get_rank() == 0 or left == 0 or failures > 2, "it was not tried again"
    return said


def test_what_one_rank_cannot_see_or_read_is_not_damaged(tiny_folder, tmp_path):
    run_ranks(make_two, 2, tiny_folder, tmp_path)
    assert run_ranks(find_what_none_sees_for_a_while, 1, tmp_path) == [True]
    first, second = run_ranks(find_on_a_slow_disk, 2, tmp_path)
    assert first == second and first["seen late"] == first["read late"] == 2
    assert "step-00000002/index.json cannot be read on rank 1 (not there)" in first["never seen"]
    assert "cannot be read on rank 1 (Stale file handle)" in first["never read"]
    assert not list((tmp_path / "sharded/checkpoints").glob("*.damaged"))


def load_wrong_ones(mesh, folder, out):
    """Loads checkpoints that are intact, but not of this model."""
    said = []
    for saved_as in ("sharded", "full"):
        checkpoint = found(out / saved_as)
        for change in (
            {"rank": 4},
            {"kind": "anyprecision", "fsdp": FsdpConfig(strategy="full-shard", precision="bf16")},
        ):
            with pytest.raises(UserError) as refused:
                training(folder, out / "new", **change).checkpoints(checkpoint)
            said.append(str(refused.value))
    part = found(out / "full").folder / "model/00001.safetensors"
    tensors = load_file(part)
    del tensors["model.norm.weight"]
    save_file({**tensors, "more": torch.ones(1)}, part)
    with pytest.raises(UserError) as refused:
        training(folder, out / "new").checkpoints(Checkpoint(part.parents[1], found(out / "full", 1).content))
    return [*said, str(refused.value)]


def test_a_checkpoint_of_another_model_is_refused(tiny_folder, tmp_path):
    run_ranks(make_two, 2, tiny_folder, tmp_path)
    [said] = run_ranks(load_wrong_ones, 1, tiny_folder, tmp_path)
    for text in said[:4:2]:
        assert "lora_A.weight has shape [8, 32], not [4, 32]" in text
    for text in said[1:4:2]:
        assert "optimizer" in text and "remainder is missing" in text
    assert "model: model.norm.weight is missing; more is not part of this run" in said[-1]


def test_the_hash_of_the_mark_covers_every_number():
    content = {"progress": {"step": 2}, "files": {"a": {"bytes": 1}}, "best": [0.1, 2]}
    assert hash_of(json.loads(json.dumps(content))) == hash_of(content)
    assert hash_of(content | {"progress": {"step": 3}}) != hash_of(content)


# ---------------------------------------------------------------------------------------------------------------------
# Failures while it is written


def fail(mesh, folder, out, how, checkpoint):
    run = training(folder, out, checkpoint=checkpoint)
    with run.checkpoints() as checkpoints:
        checkpoints.save(Progress(packs_per_step=2, step=1))
        checkpoints.finish()
        if how == "full disk" and dist.get_rank() == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
        if how == "rank dies" and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "read-only" and dist.get_rank() == 0:
            (out / f"checkpoints/step-00000002.{checkpoints.partial}.partial").write_text("in the way")
        try:
            checkpoints.save(Progress(packs_per_step=2, step=2))
            checkpoints.finish()
        except UserError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return str(error)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("how", ["full disk", "rank dies", "read-only"])
def test_a_save_that_fails_leaves_the_earlier_ones(tiny_folder, tmp_path, how, asynchronous):
    checkpoint = CheckpointConfig(async_save=asynchronous)
    args = (fail, (tiny_folder, tmp_path, how, checkpoint))
    results = _processes(_call_with_mesh, 2, *args)
    survivors = [value for kind, value in results if kind == "ok"]
    assert len(survivors) == (1 if how == "rank dies" else 2), results
    for text in survivors:
        assert re.search(rf"{tmp_path}/checkpoints/step-00000002, of 0\.\d+ MB, cannot be written: ", text), text
        assert how != "full disk" or "make room on its disk, and go on with --resume auto" in text
        assert {"full disk": "(rank 1)", "rank dies": "process", "read-only": "(rank 0)"}[how] in text
    left = sorted(re.sub(r"\.\w{8}\.", ".", path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000001"] + (["step-00000002.partial"] if how == "read-only" else [])
    [step] = run_ranks(sound_step, 1, tmp_path)
    assert step == 1


def sound_step(mesh, out):
    return found(out).progress.step
