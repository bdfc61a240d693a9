"""Interrupted runs: the same numbers as without, on the same processes and on others; what is refused; signals, restarts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model, run_ranks, run_script, save_folder, start_script
from safetensors.torch import load_file
from test_packing import of_packs
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from minillama.adapters.lora import LoraConfig
from minillama.adapters.peft import load_adapter
from minillama.data.datasets import DataConfig
from minillama.data.load import load_data
from minillama.errors import UserError
from minillama.formats.hf import from_pretrained, read_config
from minillama.inference.generate import generate
from minillama.model.llama import Llama
from minillama.parallel.sharding import FsdpConfig
from minillama.tokenizer.tokenizer import load_tokenizer
from minillama.training.config import RunConfig
from minillama.training.flag_changes import compare_flags
from minillama.training.metrics import _reopen
from minillama.training.optim import OptimConfig
from minillama.training.output_folder import find_start, start_run
from minillama.training.plan import Progress, TrainConfig, count_steps, steps
from minillama.training.resume import find_checkpoint
from minillama.training.run import with_date

RECIPES = Path(__file__).parents[1] / "recipes"
MEASURED = {"tokens_per_s", "tflops", "mfu", "peak_memory_gib", "data_wait_s"}
FLAGS = {
    "lora": ("--lora.dropout", 0.2, "--fsdp.precision", "bf16", "--optim.kind", "anyprecision", "--log.every", 3),
    "full": ("--fsdp.precision", "fp32", "--fsdp.strategy", "shard-grad-op"),
    "llama_adapter": ("--data.batching", "padding", "--checkpoint.format", "full", "--checkpoint.no-async-save"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [{"dialogue": f"A: {'hi ' * (i % 5)}\nB: bye {i}", "summary": f"They part, {i}."} for i in range(11)]
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "val.json").write_text(json.dumps(rows[:4]))
    return folder


@pytest.fixture(scope="module")
def common(tiny_folder, data):
    return [
        *("--model", tiny_folder, "--device", "cpu", "--optim.lr", 0.01, "--data.context-length", 130),
        *("--data.path", data / "train.json", "--data.val-path", data / "val.json", "--train.epochs", 2),
        *("--train.batch-size", 1, "--checkpoint.every", 1, "--checkpoint.keep", 0),
    ]


@pytest.fixture(scope="module")
def run(common, tmp_path_factory):
    log = tmp_path_factory.mktemp("logs") / "log"

    def run(recipe, out, *flags, world_size=2):
        script = RECIPES / f"{recipe}_fsdp.py"
        every = [*common, *FLAGS[recipe], "--output-dir", out, *flags]
        return run_script(script, *every, world_size=world_size, log=log)

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The folder of an undisturbed run of a recipe on two ranks, with the checkpoint of each step."""
    made = {}

    def whole(recipe):
        if recipe not in made:
            made[recipe] = tmp_path_factory.mktemp(recipe) / "whole"
            codes, text = run(recipe, made[recipe])
            assert codes == [0, 0], text
        return made[recipe]

    return whole


def interrupted(whole, out, step):
    """What the run would have left, had it been killed some time after the checkpoint of this step."""
    shutil.copytree(whole, out)
    for exported in ("adapter", "model"):
        shutil.rmtree(out / exported, ignore_errors=True)
    for path in (out / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    return out


def numbers(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def last_checkpoint(out):
    return sorted((out / "checkpoints").glob("step-????????"))[-1]


def tensors(out):
    """What a run exported, and all of its last checkpoint."""
    newest = last_checkpoint(out)
    files = [*out.glob("adapter/*.safetensors"), *out.glob("model/*.safetensors"), *newest.rglob("*.safetensors")]
    found = {f"{file.relative_to(out)} {name}": tensor for file in files for name, tensor in load_file(file).items()}
    if (newest / ".metadata").exists():
        dcp_to_torch_save(newest, out.with_suffix(".pt"))
        for part, members in torch.load(out.with_suffix(".pt"), weights_only=True).items():
            found |= {f"{part} {name}": tensor for name, tensor in members.items()}
    return found


def assert_same_end(out, whole):
    one, other = tensors(out), tensors(whole)
    assert one.keys() == other.keys() and any("exp_avg" in name for name in one)
    assert not [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    assert numbers(out) == numbers(whole)


def pytest_generate_tests(metafunc):
    if "place" in metafunc.fixturenames:
        some = [("lora", "middle"), ("full", "edge"), ("llama_adapter", "last")]
        every = [(recipe, place) for recipe, _ in some for _, place in some]
        metafunc.parametrize("recipe, place", every if metafunc.config.getoption("--whole-matrix") else some)


def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(run, whole, tmp_path, recipe, place):
    first = whole(recipe)
    total = int(last_checkpoint(first).name.removeprefix("step-"))
    assert total >= 6 and total % 2 == 0
    step = {"middle": total // 2 - 2, "edge": total // 2, "last": total - 2}[place]
    out = interrupted(first, tmp_path / "out", step)
    codes, text = run(recipe, out, "--resume", "auto")
    assert codes == [0, 0] and f"after step {step}\n" in text, text
    assert_same_end(out, first)
    assert json.loads((out / "run.json").read_text())["id"] == json.loads((first / "run.json").read_text())["id"]


def test_other_numbers_of_processes_make_the_same_steps(run, whole, tmp_path):
    first = whole("full")
    total = int(last_checkpoint(first).name.removeprefix("step-"))
    out = first
    for number, (world_size, step, *flags) in enumerate(
        [(1, 2), (4, total // 2 + 1, "--fsdp.strategy", "full-shard"), (2, total - 2)]
    ):
        out = interrupted(out, tmp_path / str(number), step)
        codes, text = run("full", out, "--resume", "auto", *flags, world_size=world_size)
        assert codes == [0] * world_size and f"after step {step}; on {world_size} instead of" in text, text
    for ours, theirs in zip(numbers(out), numbers(first), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4) and ours.get("tokens") == theirs.get("tokens")
    one, other = load_file(out / "model/model.safetensors"), load_file(first / "model/model.safetensors")
    assert all(torch.allclose(tensor, other[name], atol=1e-4) for name, tensor in one.items())


def test_a_finished_run_stays_as_it_is(run, whole, tmp_path):
    shutil.copytree(whole("full"), tmp_path / "out")
    codes, text = run("full", tmp_path / "out", "--resume", "auto")
    assert codes == [0, 0], text
    assert_same_end(tmp_path / "out", whole("full"))


@pytest.mark.parametrize("batching", ["packing", "padding"])
def test_the_samples_of_a_step_do_not_depend_on_who_takes_them(batching):
    random = np.random.default_rng(0)
    for _ in range(25):
        packed = of_packs(batching, int(random.integers(1, 60)))
        config = TrainConfig(epochs=3, batch_size=int(random.integers(1, 5)), accumulate=int(random.integers(1, 4)))
        start = config.begin(int(random.integers(1, 9)))

        def taken(start, world_size, batch_size, packed=packed, config=config):
            config = replace(config, batch_size=batch_size)
            ranks = [list(steps(packed, config, 7, rank, world_size, start)) for rank in range(world_size)]
            for all_ranks in zip(*ranks, strict=True):
                micro_batches = [m for step in all_ranks for m in step.micro_batches]
                assert len({len(step.micro_batches) for step in all_ranks}) == 1
                assert max(map(len, micro_batches)) <= batch_size
                yield all_ranks[0], sorted(i for m in micro_batches for i in m.tolist())

        everything = list(taken(start, 1, config.batch_size))
        assert len(everything) == count_steps(packed, config, start.packs_per_step)
        for epoch in range(3):
            packs = [i for step, ids in everything if step.epoch == epoch for i in ids]
            assert sorted(packs) == list(range(len(packed)))
        where = start
        done = []
        while len(done) < len(everything):  # a few steps each time, on other ranks, in other micro-batches
            part = list(taken(where, int(random.integers(1, 9)), int(random.integers(1, 6))))[: random.integers(1, 9)]
            done += [(step.number, step.epoch, ids) for step, ids in part]
            last = part[-1][0]
            where = Progress(
                packs_per_step=start.packs_per_step, step=last.number + 1, epoch=last.epoch, cursor=last.cursor
            )
        assert done == [(step.number, step.epoch, ids) for step, ids in everything]


def test_metrics_keep_what_the_checkpoint_has(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 0, "eval_loss": 1}',
        '{"step": 1, "loss": 1}',
        '{"step": 2, "loss": 1}',
        '{"step": 2, "eval_loss": 1}',
    ]
    for start, kept in [
        (Progress(packs_per_step=1), 0),
        (Progress(packs_per_step=1, step=1, evaluate=False), 2),
        (Progress(packs_per_step=1, step=2, evaluate=False), 4),
        (Progress(packs_per_step=1, step=2, evaluate=True), 3),
    ]:
        file.write_text("\n".join([*lines, '{"step": 3, "loss": 1}', '{"st']))
        _reopen(file, start).close()
        assert file.read_text().splitlines() == lines[:kept]


# ---------------------------------------------------------------------------------------------------------------------
# What may change


@dataclass(frozen=True)
class LoraFlags(LoraConfig):
    """The recipe's that a checkpoint must have alike."""

    quantize: str = "none"
    plus_ratio: float = 1.0


@dataclass(frozen=True)
class Config(RunConfig):
    lora: LoraFlags = LoraFlags()


def resume_each(mesh, base, changes):
    """What start_run says to each of these changed flags."""
    with torch.device("meta"):
        model = Llama(read_config(base.model))
    base = replace(base, data=with_date(base.data, find_start(base)))
    said, tokenizer = [], load_tokenizer(base.model)
    for change in changes:
        config = replace(base, **change)
        before = (config.output_dir / "run.json").read_bytes() if config.output_dir.exists() else None
        try:
            train, _ = load_data(config.data, tokenizer, model.config.vocab_size, config.seed, validation=True)
            progress, _ = start_run(config, train, find_start(config))
            said.append((progress.step, progress.packs_per_step))
        except UserError as error:
            said.append(str(error))
            after = (config.output_dir / "run.json").read_bytes() if config.output_dir.exists() else None
            assert before == after
    checkpoint = find_checkpoint(base.resume, base.output_dir)
    fingerprints = checkpoint.content["fingerprints"]
    for what in ("model", "data"):
        with pytest.raises(UserError, match=f"with {what} whose content is not what it was"):
            compare_flags(base, checkpoint, fingerprints | {what: "another"})
    return said


def start_again(mesh, config):
    """Where a run starts on one process; restarted twice, as if three had begun it; and by another command."""
    with torch.device("meta"):
        model = Llama(read_config(config.model))
    tokenizer = load_tokenizer(config.model)
    train, _ = load_data(config.data, tokenizer, model.config.vocab_size, config.seed, validation=False)
    file, found = config.output_dir / "run.json", []
    for run_id in ("job", "job", "job", "another"):
        os.environ["TORCHELASTIC_RUN_ID"] = run_id
        found.append(start_run(config, train, find_start(config))[0])
        run = json.loads(file.read_text())
        assert run["packs_per_step"] == found[-1].packs_per_step
        if len(found) == 1:
            file.write_text(json.dumps(run | {"packs_per_step": 6, "agents": [1, *run["agents"], 2]}))
    return found


def test_steps_keep_their_packs_if_machines_are_lost_before_the_first_checkpoint(data, tiny_folder, tmp_path):
    of_data = DataConfig(path=data / "train.json", context_length=130, date="2024-07-26")
    train = TrainConfig(batch_size=2)
    config = Config(model=tiny_folder, output_dir=tmp_path / "out", resume="auto", data=of_data, train=train)
    [found] = run_ranks(start_again, 1, config)
    assert found == [Progress(packs_per_step=number) for number in (2, 6, 6, 2)]


def test_what_a_run_cannot_go_on_with_is_refused_by_name(whole, data, tiny_folder, tmp_path):
    out = interrupted(whole("lora"), tmp_path / "out", 3)
    other_base = save_folder(random_model(seed=1), tmp_path / "other")
    other_data = tmp_path / "train.json"
    other_data.write_text((data / "train.json").read_text().replace("part, 3", "meet, 3"))
    (tmp_path / "same.json").write_text((data / "train.json").read_text())
    of_data = DataConfig(path=data / "train.json", val_path=data / "val.json", context_length=130)
    base = Config(
        model=tiny_folder,
        output_dir=out,
        resume="auto",
        data=of_data,
        train=TrainConfig(epochs=2, batch_size=2),  # on one process what 1 was on two
        optim=OptimConfig(lr=0.01, kind="anyprecision"),
        fsdp=FsdpConfig(precision="bf16"),
        lora=LoraFlags(dropout=0.2),
    )
    refused = {
        "--seed 1 (was 42)": {"seed": 1},
        "--lora.rank 4 (was 8)": {"lora": LoraFlags(rank=4, dropout=0.2)},
        "--lora.dropout 0.05 (was 0.2)": {"lora": LoraFlags()},
        "--lora.quantize nf4 (was none)": {"lora": LoraFlags(dropout=0.2, quantize="nf4")},
        "--fsdp.precision mixed (was bf16)": {"fsdp": FsdpConfig(precision="mixed")},
        "--optim.kind adamw (was anyprecision)": {"optim": OptimConfig(lr=0.01)},
        f"--model {other_base} (was": {"model": other_base},
        f"--data.path {other_data} (was": {"data": replace(of_data, path=other_data)},
        "--data.context-length 140 (was 130)": {"data": replace(of_data, context_length=140)},
        "give --train.accumulate 2": {"train": TrainConfig(epochs=2, batch_size=1, accumulate=3)},
        "have 2: give what it was made with": {"train": TrainConfig(epochs=2, batch_size=3)},
        "there is no checkpoint": {"resume": str(tmp_path)},
        "holds a newer checkpoint, of step 3": {"resume": str(out / "checkpoints/step-00000002")},
        "already holds a run: go on with it by --resume auto": {"resume": "none"},
    }
    accepted = [
        {},
        {"train": TrainConfig(epochs=5, batch_size=1, accumulate=2), "optim": replace(base.optim, lr=1.0)},
        {"train": TrainConfig(epochs=2, batch_size=1)},  # the flags as they were: the steps stay, too
        {"data": replace(of_data, path=tmp_path / "same.json")},
        {"resume": str(out / "checkpoints/step-00000002"), "output_dir": tmp_path / "new"},
        {"resume": str(out), "output_dir": tmp_path / "newer"},
        {"output_dir": tmp_path / "empty"},
    ]
    [said] = run_ranks(resume_each, 1, base, [*refused.values(), *accepted])
    for part, text in zip(refused, said, strict=False):
        assert isinstance(text, str) and part in text, (part, text)
    assert said[len(refused) :] == [(3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (3, 2), (0, 2)]


def test_best_and_weights_alone(run, tmp_path):
    """A rate at which the loss rises soon: the best checkpoint is not among the newest."""
    out = tmp_path / "out"
    flags = (
        "--checkpoint.best",
        "--checkpoint.keep",
        1,
        "--checkpoint.no-save-optimizer",
        "--optim.schedule",
        "constant",
    )
    flags = (*flags, "--eval.every", 1, "--train.max-steps", 5, "--optim.lr", 1.0, "--checkpoint.every", -1)
    codes, text = run("full", out, *flags, world_size=1)
    assert codes == [0], text

    def evaluated():
        return {line["step"]: line["eval_loss"] for line in numbers(out) if "eval_loss" in line and line["step"]}

    losses = evaluated()
    best = min(losses, key=losses.get)
    assert best < 5 and f"lowest validation loss {losses[best]:.4f}: checkpoints/step-{best:08}" in text
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{best:08}"]
    shutil.rmtree(out / "model")
    codes, text = run("full", out, *flags, "--resume", "auto", "--checkpoint.every", 1, world_size=1)
    assert codes == [0] and "has no optimizer state" in text and "changed     --checkpoint.every 1 (was -1)" in text
    losses = evaluated()  # with empty moments it goes another way
    kept = [f"step-{step:08}" for step in sorted({min(losses, key=losses.get), 5})]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == kept


# ---------------------------------------------------------------------------------------------------------------------
# Signals and restarts


def when_lines(out, count, running, kind='"loss"'):
    """Waits until the metrics have so many lines of a kind."""
    file, deadline = out / "metrics.jsonl", time.monotonic() + 100
    while not file.exists() or file.read_text().count(kind) < count:
        assert running() and time.monotonic() < deadline, "the run ended too early, or hangs"
        time.sleep(0.01)


def test_a_signal_saves_and_a_killed_worker_is_replaced(run, common, data, tmp_path):
    """On a quantised base; then the adapter evaluates and generates on it as if nothing had happened."""
    wide = {"hidden_size": 64}  # NF4's blocks have 64 weights
    model = save_folder(random_model(**wide), tmp_path / "wide", **wide)
    flags = ("--train.epochs", 6, "--checkpoint.every", 7, "--checkpoint.keep", 1, "--eval.every", 20)
    flags = (*flags, "--fsdp.precision", "fp32")  # many steps: bf16 is slow on some machines
    flags = (*flags, "--model", model, "--lora.quantize", "nf4")
    codes, text = run("lora", tmp_path / "whole", *flags)
    assert codes == [0, 0], text
    out, log = tmp_path / "out", tmp_path / "log"
    flags = [*common, *FLAGS["lora"], *flags, "--output-dir", out]

    workers, wait = start_script(RECIPES / "lora_fsdp.py", *flags, world_size=2, log=log)
    when_lines(out, 3, workers[1].is_alive)
    for number in (signal.SIGUSR1, signal.SIGUSR1):
        os.kill(workers[1].pid, number)
    codes, text = wait()
    assert codes == [138, 138] and text.count("stopped by SIGUSR1") == 1
    stopped_after = int(last_checkpoint(out).name.removeprefix("step-"))
    done = len([line for line in numbers(out) if "loss" in line])
    assert 3 * done <= stopped_after < 3 * done + 3  # a line every three steps

    torchrun = [Path(sys.executable).parent / "torchrun", "--nproc_per_node", 2, "--max-restarts", 2]
    command = [*torchrun, RECIPES / "lora_fsdp.py", *flags, "--resume", "auto"]
    with log.open("w") as file:
        process = subprocess.Popen([*map(str, command)], stdout=file, stderr=file, env=os.environ)
    when_lines(out, done + 3, lambda: process.poll() is None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert process.wait(100) == 0, log.read_text()
    assert log.read_text().count("resumed     ") == 2
    assert_same_end(out, tmp_path / "whole")

    flags = ["--model", model, "--adapter", out / "adapter", "--quantize", "nf4", "--dtype", "fp32", "--device", "cpu"]
    rows = ["--data.path", data / "val.json", "--data.context-length", 130, "--output", tmp_path / "found.json"]
    codes, text = run_script(RECIPES / "evaluate.py", *flags, *rows, log=log)
    assert codes == [0], text
    found = json.loads((tmp_path / "found.json").read_text())["results"]["adapted"]["eval_loss"]
    losses = [line["eval_loss"] for line in numbers(out) if "eval_loss" in line]
    assert found == pytest.approx(losses[-1], abs=1e-5) and losses[-1] < losses[0]
    prompt = ["--prompt", "A: hi", "--template", "none", "--max-new-tokens", 5]
    codes, text = run_script(RECIPES / "generate.py", *flags, *prompt, log=log)
    adapted, tokenizer = load_adapter(from_pretrained(model, quantize="nf4"), out / "adapter"), load_tokenizer(model)
    new = generate(adapted, tokenizer.encode("A: hi", bos=True), max_new_tokens=5, stop_ids=[tokenizer.eos_id])
    assert codes == [0] and tokenizer.decode(new) in text, text


def test_a_signal_ends_an_evaluation_which_is_made_up_for(common, data, tmp_path):
    (tmp_path / "long.json").write_text(json.dumps(json.loads((data / "train.json").read_text()) * 40))
    out, log = tmp_path / "out", tmp_path / "log"
    flags = [*common, "--output-dir", out, "--data.val-path", tmp_path / "long.json", "--data.batching", "padding"]
    flags = [*flags, "--eval.every", 2, "--train.max-steps", 2, "--resume", "auto", "--eval.batch-size", 1]
    script = RECIPES / "full_fsdp.py"
    workers, wait = start_script(script, *flags, world_size=2, log=log)
    when_lines(out, 2, workers[0].is_alive)
    time.sleep(0.3)
    os.kill(workers[0].pid, signal.SIGTERM)
    assert wait()[0] == [143, 143]
    assert [line["step"] for line in numbers(out) if "eval_loss" in line] == [0]
    mark = json.loads((last_checkpoint(out) / "checkpoint.json").read_text())
    assert mark["progress"]["step"] == 2 and mark["progress"]["evaluate"]
    codes, text = run_script(script, *flags, "--eval.max-steps", 5, world_size=2, log=log)
    assert codes == [0, 0], text
    assert [line["step"] for line in numbers(out) if "eval_loss" in line] == [0, 2]
