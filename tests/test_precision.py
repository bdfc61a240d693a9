"""What a run computes in: chosen by measurement, cached, and kept by a run that resumes."""

import json
import os
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import random_model, run_ranks, run_script, save_folder
from test_packing import documents_of
from test_recipes import FAST, RECIPES

from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.data.batch import collate
from minillama.data.packing import pack
from minillama.formats.hf import check_weights, load_weights, read_config
from minillama.hardware import benchmark, precision
from minillama.hardware.precision import choose_precision, compact_base, cpu_rate
from minillama.inference.load import load_model
from minillama.model.llama import Llama
from minillama.parallel.initialise import initialise, materialise
from minillama.parallel.sharding import FsdpConfig, set_dtypes, shard
from minillama.training.optim import OptimConfig, make_optimizer
from minillama.training.step import train_step

AUTO = FsdpConfig()
SLOW_BF16 = {torch.float32: 100e9, torch.bfloat16: 5e9, torch.float16: 4e9}
FAST_BF16 = {torch.float32: 100e9, torch.bfloat16: 250e9, torch.float16: 4e9}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes this a machine of other rates, whose measurements are counted."""
    measured = []

    def machine(rates):
        def training_rate(dtype):
            measured.append(dtype)
            return rates[dtype]

        monkeypatch.setattr(benchmark, "training_rate", training_rate)
        return measured

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return machine


def test_a_cpu_takes_what_it_is_measured_to_multiply_faster(machine, tmp_path, capsys):
    machine(SLOW_BF16)
    chosen, said = choose_precision(AUTO, "cpu", cache_dir=tmp_path / "slow")
    assert chosen == replace(AUTO, precision="fp32") and said == "fp32 (auto: bf16 5, fp32 100 GFLOP/s a core)"
    machine(FAST_BF16)
    chosen, said = choose_precision(AUTO, "cpu", cache_dir=tmp_path / "fast")
    assert chosen == replace(AUTO, precision="mixed") and said == "mixed (auto: bf16 250, fp32 100 GFLOP/s a core)"
    assert capsys.readouterr().err == ""


def test_the_choice_here_is_that_of_a_layer_timed_here(tmp_path):
    def seconds(dtype):
        layer = torch.nn.Linear(512, 1536, bias=False, dtype=dtype)
        x = torch.ones(128, 512, dtype=dtype, requires_grad=True)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            layer(x).backward(torch.ones(128, 1536, dtype=dtype))
            times.append(time.perf_counter() - start)
        return min(times)

    ratio = seconds(torch.float32) / seconds(torch.bfloat16)
    if 1 / 1.5 < ratio < 1.5:
        pytest.skip("bf16 and fp32 are as fast as each other here")
    assert choose_precision(AUTO, "cpu", cache_dir=tmp_path)[0].precision == ("mixed" if ratio > 1 else "fp32")


def test_it_is_measured_once_a_machine(machine, monkeypatch):
    measured = machine(SLOW_BF16)
    first = choose_precision(AUTO, "cpu")
    assert measured == [torch.bfloat16, torch.float32]
    machine(FAST_BF16)
    assert choose_precision(AUTO, "cpu") == first and len(measured) == 2
    # what decides on the instructions is another machine
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2" if os.environ.get("ONEDNN_MAX_CPU_ISA") != "AVX2" else "SSE41")
    assert choose_precision(AUTO, "cpu")[0].precision == "mixed" and len(measured) == 4


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"machine": {"processor": "Z80"}, "rate": 1.0}', "was measured on {'processor': 'Z80'}"),
        ("{", "is damaged (JSONDecodeError("),
        ("[1]", "is damaged (TypeError("),
        ('{"rate": 1.0}', "is damaged (KeyError('machine'))"),
        (None, "holds no rate"),
    ],
)
def test_a_measurement_that_cannot_be_used_is_made_again(machine, tmp_path, capsys, content, message):
    machine(SLOW_BF16)
    assert cpu_rate(torch.float32) == 100e9
    [file] = (tmp_path / "cache" / "minillama" / "measured").iterdir()
    right = file.read_text()
    file.write_text(content or right.replace("100000000000.0", "NaN"))
    assert cpu_rate(torch.float32) == 100e9 and file.read_text() == right
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {file} {message}") and said.endswith("it is measured again\n")
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_is_one_warning(machine, tmp_path, capsys):
    measured = machine(FAST_BF16)
    (tmp_path / "cache").write_text("a file")
    first = choose_precision(AUTO, "cpu")
    assert first[0].precision == "mixed"
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "measured cannot be written (Not a directory)" in said
    machine(SLOW_BF16)  # and what this process has measured stays
    assert choose_precision(AUTO, "cpu") == first and len(measured) == 2 and capsys.readouterr().err == ""


def test_what_other_programs_take_of_a_core_is_not_measured():
    def call():
        time.sleep(0.004)  # another program has the core
        start = time.thread_time()
        while time.thread_time() < start + 0.001:
            pass

    assert 0.001 <= benchmark.fastest(call) < 0.003


def test_a_slower_run_at_the_same_time_takes_the_answer_that_is_there(machine, monkeypatch):
    machine(SLOW_BF16)

    def training_rate(dtype):  # while it measures, another run does
        monkeypatch.setattr(benchmark, "training_rate", lambda dtype: 77e9)
        assert cpu_rate(dtype) == 77e9
        return 50e9

    monkeypatch.setattr(benchmark, "training_rate", training_rate)
    assert cpu_rate(torch.float32) == 77e9 == cpu_rate(torch.float32)


def test_a_precision_by_hand_that_is_slow_here_is_one_warning(machine, tmp_path, capsys):
    machine(SLOW_BF16)
    for given in ("mixed", "bf16"):
        config = FsdpConfig(precision=given)
        assert choose_precision(config, "cpu") == (config, given)
        slow = "computes in bfloat16, at 5 GFLOP/s a core here; float32 has 100: 20 times as fast"
        assert capsys.readouterr().err == f"warning: --fsdp.precision {given} {slow}\n"
    choose_precision(FsdpConfig(precision="bf16"), "cpu", flag="--dtype")
    assert capsys.readouterr().err.startswith("warning: --dtype bf16 computes in bfloat16")
    choose_precision(FsdpConfig(precision="fp16"), "cpu")
    assert "float16, at 4 GFLOP/s" in capsys.readouterr().err
    machine(FAST_BF16)
    choose_precision(FsdpConfig(precision="fp32"), "cpu", cache_dir=tmp_path / "fast")  # 2.5 times
    assert capsys.readouterr().err == ""


def test_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(precision, "matmul_rate", lambda device, dtype: {torch.float16: 9e13}.get(dtype, 9e12))
    for capability, wanted in (
        ((9, 0), "mixed"),
        ((8, 0), "mixed"),
        ((7, 5), "fp16"),
        ((7, 0), "fp16"),
        ((6, 1), "fp32"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert choose_precision(AUTO, "cuda")[0].precision == wanted
    assert capsys.readouterr().err == ""
    choose_precision(FsdpConfig(precision="bf16"), "cuda")
    assert (
        capsys.readouterr().err
        == "warning: --fsdp.precision bf16: a GPU has no bf16 and emulates it slowly; auto takes another\n"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    choose_precision(FsdpConfig(precision="fp32"), "cuda")
    assert "computes in float32, at 9e+03 GFLOP/s here; float16 has 9e+04: 10 times as fast" in capsys.readouterr().err


def choose_apart(mesh, folder):
    os.environ["XDG_CACHE_HOME"] = f"{folder}/{dist.get_rank()}"
    benchmark.training_rate = (FAST_BF16 if dist.get_rank() == 0 else SLOW_BF16).get
    chosen = choose_precision(AUTO, "cpu")
    torch.cuda.get_device_name = lambda: "a GPU"
    torch.cuda.get_device_capability = lambda: (9, 0) if dist.get_rank() == 0 else (7, 0)
    return chosen, choose_precision(AUTO, "cuda")[0].precision


def test_ranks_of_different_machines_compute_the_same(tmp_path):
    one, two = run_ranks(choose_apart, 2, tmp_path)
    assert one == two and one[0][0].precision == "mixed" and one[1] == "fp16"


def remember(folder, rates, attention):
    """Makes the measurements of a run with --data.cache-dir folder, in which an attention is the fastest."""
    for dtype, rate in rates.items():
        benchmark.remembered(f"matmul-{dtype}".replace("torch.", ""), lambda rate=rate: rate, folder)
        for name in ("math", "sdpa"):
            rate = 2.0 if name == attention else 1.0
            benchmark.remembered(f"attention-{name}-{dtype}".replace("torch.", ""), lambda rate=rate: rate, folder)
    return folder


@pytest.mark.parametrize("first, kept, attention", [(SLOW_BF16, "fp32", "math"), (FAST_BF16, "mixed", "sdpa")])
def test_a_resumed_run_keeps_its_precision_and_attention_on_another_machine(
    tiny_folder, tmp_path, first, kept, attention
):
    other = SLOW_BF16 if first is FAST_BF16 else FAST_BF16
    flags = [flag for flag in FAST if flag not in ("--fsdp.precision", "fp32")]
    flags += ["--model", tiny_folder, "--output-dir", tmp_path / "out", "--device", "cpu", "--resume", "auto"]
    flags += ["--data.context-length", 400, "--eval.no-enabled", "--checkpoint.every", 1, "--train.epochs", 9]

    def run(cache, steps, *more):
        every = [*flags, "--data.cache-dir", cache, "--train.max-steps", steps, *more]
        codes, text = run_script(RECIPES / "lora_fsdp.py", *every, world_size=2, log=tmp_path / "log")
        return codes, text, json.loads((tmp_path / "out" / "run.json").read_text())["flags"]["fsdp"]["precision"]

    codes, text, resolved = run(remember(tmp_path / "here", first, attention), 1)
    assert codes == [0, 0] and resolved == kept, text
    assert text.count(f"precision   {kept} (auto: bf16 ") == 1
    assert text.count(f"attention   {attention} (auto: 2 tokens/s a core") == 1
    codes, text, resolved = run(remember(tmp_path / "there", other, "sdpa" if attention == "math" else "math"), 2)
    assert codes == [0, 0] and resolved == kept, text
    assert text.count(f"precision   {kept} (auto: the checkpoint's)") == 1
    assert text.count(f"attention   {attention} (auto: the checkpoint's)") == 1
    slow = "warning: the checkpoint's precision mixed computes in bfloat16, at 5 GFLOP/s a core here"
    assert text.count("warning: ") == text.count(slow) == (kept == "mixed")
    codes, text, _ = run(tmp_path / "there", 3, "--fsdp.precision", kept)
    assert codes == [0, 0], text
    given = "fp32" if kept == "mixed" else "mixed"
    codes, text, _ = run(tmp_path / "there", 4, "--fsdp.precision", given)
    assert codes == [1, 1] and f"cannot be resumed with --fsdp.precision {given} (was {kept})" in text


def train_compact(mesh, folder, memory):
    """The dtypes of the base, what is said, and loss and gradient norm of two steps; and logits of the frozen base."""
    precision.least_memory = lambda device: memory
    fsdp = FsdpConfig(strategy="full-shard", precision="fp32")
    with torch.device("meta"):
        model = Llama(read_config(folder)).requires_grad_(False)
    weights = check_weights(model, folder)
    apply_lora(model, LoraConfig(rank=2, dropout=0.0, targets=("q_proj", "lm_head")))
    set_dtypes(model, fsdp)
    said = compact_base(model, weights, fsdp, mesh)
    shard(model, mesh, fsdp)
    materialise(model, "cpu")
    initialise(model, 0, loaded=load_weights(model, folder))
    dtypes = {str(p.dtype) for p in model.parameters() if not p.requires_grad}
    optimizer = make_optimizer(model.parameters(), OptimConfig(lr=0.01))
    packed = pack(documents_of([37]), 40, 0)
    numbers = []
    for _ in range(2):
        loss, norm = train_step(model, optimizer, [collate(packed, [0], 0, "cpu")])
        numbers += [loss.item(), norm.item()]
    trains = {str(p.dtype) for p in model.parameters() if p.requires_grad}
    with torch.no_grad():
        logits = load_model(folder, "cpu", dtype="fp32")(torch.arange(20)[None])
    return dtypes, trains, said, numbers, logits


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_base_that_does_not_fit_stays_in_half_precision_and_computes_the_same(tmp_path, world_size):
    folder = save_folder(random_model().to(torch.bfloat16), tmp_path / "half")
    [small, *others], [large, *_] = (run_ranks(train_compact, world_size, folder, memory) for memory in (1e5, 1e12))
    assert (
        small[0] == {"torch.bfloat16"} and large[0] == {"torch.float32"} and small[1] == large[1] == {"torch.float32"}
    )
    assert small[2] == "; the frozen base stays in bfloat16 and is cast a block at a time" and large[2] == ""
    assert small[3] == large[3]
    assert torch.equal(small[4], large[4]) and all(torch.equal(small[4], other[4]) for other in others)
    # and files in fp32 have nothing to keep
    [full, *_] = run_ranks(train_compact, world_size, save_folder(random_model(), tmp_path / "full"), 1e5)
    assert full[0] == {"torch.float32"} and full[2] == ""


def test_auto_must_be_resolved():
    with pytest.raises(ValueError, match="choose_precision"):
        _ = AUTO.compute_dtype
