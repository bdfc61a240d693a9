"""--profile.*: FLOPs counted and computed agree, traces hold our step; and what is said when memory runs out."""

import gzip
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model, run_ranks, run_script
from test_packing import documents_of
from test_recipes import FAST, RECIPES, check_refused, data, metrics, run  # noqa: F401
from torch.utils.checkpoint import checkpoint

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.data.batch import collate
from minillama.data.packing import pack
from minillama.errors import UserError
from minillama.model.attention import BACKENDS
from minillama.parallel.failures import out_of_memory
from minillama.parallel.sharding import FsdpConfig
from minillama.training.config import RunConfig
from minillama.training.flops import FlopCounter, step_flops
from minillama.training.optim import OptimConfig, make_optimizer
from minillama.training.out_of_memory import FRAGMENTS, REST, check_context_fits, held_bytes, remedies
from minillama.training.plan import TrainConfig
from minillama.training.profiling import ProfileConfig
from minillama.training.step import batch_loss

WIDTH, SLOTS = 32, 5  # of all heads together; of llama-adapter's prompt


def counted(model):
    """(FLOPs in matrix products, in attention) counted in two micro-batches, and (tokens, labels, squares) of them."""
    packed = pack(documents_of([20, 30, 14, 40, 24]), 64, 0)
    batches = [collate(packed, [p], 0, "cpu") for p in range(len(packed))]
    assert len(batches) == 2 and all(batch.count == 64 for batch in batches)  # no padding
    with FlopCounter() as counter:
        for batch in batches:
            batch_loss(model, batch).backward()
    counts = [sum(getattr(batch, name) for batch in batches) for name in ("count", "trained", "squares")]
    return (counter.in_products, counter.in_attention), counts


def needed(model, tokens, trained, squares):
    return step_flops(model, tokens, trained, 0), step_flops(model, 0, 0, squares)


def first_projections(model):
    return sum(getattr(model.model.layers[0].self_attn, f"{name}_proj").weight.numel() for name in "qkv")


@pytest.mark.parametrize("kernel", ["sdpa", "math"])
def test_flops_of_full_fine_tuning_are_those_of_the_formula(kernel):
    model = random_model()
    model.attention = BACKENDS[kernel]
    (products, attention), counts = counted(model)
    assert products == needed(model, *counts)[0]
    # half of the square is needed: 2 (forward) + 4; counted are 4 + 8 and the scores again in the backward
    assert attention == 14 / 6 * needed(model, *counts)[1] == 14 * 3 * WIDTH * counts[2]


def test_flops_of_lora():
    model = apply_lora(random_model().requires_grad_(False), LoraConfig(rank=4, targets=("all-linear",)))
    (products, attention), counts = counted(model)
    # the formula lets the first block hand a gradient on to the embedding, which is frozen
    saved = first_projections(model) + 3 * 4 * WIDTH
    assert products == needed(model, *counts)[0] - 2 * counts[0] * saved
    assert attention == 14 / 6 * needed(model, *counts)[1]


def test_flops_of_llama_adapter():
    model = apply_llama_adapter(random_model().requires_grad_(False), LlamaAdapterConfig(prompt_len=SLOTS))
    (products, attention), counts = counted(model)
    # what the formula leaves out: keys and values of the prompt and its gradient through them, in 2 micro-batches
    prompts = 3 * 2 * 4 * SLOTS * 2 * WIDTH * WIDTH // 2
    assert products == needed(model, *counts)[0] - 2 * counts[0] * first_projections(model) + prompts
    # the first block's own attention has no backward; and each token attends to the prompt
    assert attention == (14 * 2 + 4) * WIDTH * counts[2] + 3 * 14 * WIDTH * counts[0] * SLOTS


def test_recomputation_is_counted():
    model = random_model()
    for block in model.model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    (products, attention), counts = counted(model)
    block = model.model.layers[0]
    # it stops where the last of what is needed is there again: before the last matrix
    again = sum(p.numel() for p in block.parameters() if p.ndim == 2) - block.mlp.down_proj.weight.numel()
    assert products == needed(model, *counts)[0] + 3 * 2 * counts[0] * again
    assert attention == 18 / 6 * needed(model, *counts)[1]


def reported(text):
    """What a run printed: (counted products, attention), (needed ...), ratio, seconds, TFLOP/s, MFU."""
    number = r"([\d.e+-]+)"
    counted, needed = (
        [float(n) for n in re.search(rf"{name} +{number} \+ {number} = ", text).groups()]
        for name in ("counted", "needed")
    )
    ratio, seconds = map(float, re.search(rf"counting takes time: {number} x as much, {number} s", text).groups())
    speed = float(re.search(rf"/ seconds = {number} TFLOP/s", text)[1])
    rate, mfu = map(float, re.search(rf"/ {number} TFLOP/s of matmuls = {number}%", text).groups())
    return counted, needed, ratio, seconds, speed, rate, mfu


def test_flops_of_a_run_are_of_all_ranks(run):  # noqa: F811
    flags = (*FAST, "--train.batch-size", 1, "--train.accumulate", 2, "--train.max-steps", 2, "--eval.every", 1)
    codes, text, out = run(*flags, "--profile.flops", "--profile.flops-start", 1, recipe="full", world_size=2)
    assert codes == [0, 0] and text.count("MFU = ") == 1, text
    by_counter, by_formula, ratio, seconds, speed, rate, mfu = reported(text)
    first, second = (
        needed(random_model(), line["tokens"], line["trained_tokens"], 0)[0] / 1e12 for line in metrics(out)[0]
    )
    assert (
        by_counter[0] == by_formula[0] == pytest.approx(first, rel=1e-5)
    )  # of all ranks and micro-batches, no evaluation
    assert by_counter[1] == pytest.approx(14 / 6 * by_formula[1], rel=1e-4)
    assert ratio == pytest.approx(second / first, rel=0.2)
    assert speed == pytest.approx(sum(by_counter) * ratio / seconds, rel=1e-4)
    assert mfu == pytest.approx(100 * sum(by_formula) * ratio / seconds / rate, abs=0.01)


def test_a_trace_of_each_rank(run, tmp_path):  # noqa: F811
    folder = tmp_path / "new" / "traces"
    flags = (*FAST, "--train.batch-size", 1, "--train.max-steps", 6, "--eval.no-enabled", "--kernels.attention", "math")
    codes, text, _ = run(*flags, "--profile.trace-dir", folder, world_size=2)
    assert codes == [0, 0], text
    assert sorted(file.name for file in folder.iterdir()) == [f"rank{rank}.pt.trace.json.gz" for rank in range(2)]
    for rank in range(2):
        trace = json.loads(gzip.decompress((folder / f"rank{rank}.pt.trace.json.gz").read_bytes()))
        assert trace["distributedInfo"]["rank"] == rank
        events = {}
        for event in trace["traceEvents"]:
            events.setdefault(event["name"], []).append(event)
        assert {name for name in events if name.startswith("ProfilerStep")} == {f"ProfilerStep#{n}" for n in (3, 4, 5)}
        assert len(events["_LinearCrossEntropyBackward"]) == 3
        assert len(events["_LinearCrossEntropy"]) == 3
        assert {"minillama::blockwise_attention_backward", "gloo:all_reduce"} <= events.keys()
        assert any(event["args"].get("Input Dims", [[]])[0][-1:] == [WIDTH] for event in events["aten::mm"])
    assert text.count("in operations on cpu, most in:") == 1 and re.search(r"% +\d+ calls  aten::", text)


FLAGS = {
    "both": (["--profile.flops", "--profile.trace-dir", "t"], "--profile.flops and --profile.trace-dir: give one"),
    "few to trace": (
        ["--profile.trace-dir", "t", "--train.max-steps", 5],
        "--profile.trace-dir needs a run of at least 6",
    ),
    "few to count": (
        ["--profile.flops", "--train.max-steps", 3],
        "--profile.flops of step 3, with the next to be timed",
    ),
    "no step 0": (["--profile.flops", "--profile.flops-start", 0], "--profile.flops-start 0: must be at least 1"),
    "snapshot": (["--profile.memory-snapshot", "m.pickle"], "--profile.memory-snapshot is of CUDA's memory"),
}


@pytest.mark.parametrize(("flags", "message"), FLAGS.values(), ids=FLAGS)
def test_impossible_flags(run, flags, message):  # noqa: F811
    check_refused(*run("--model", "/nowhere", *flags), message)


def test_a_run_of_too_few_steps_ends_before_the_weights_are_read(run):  # noqa: F811
    codes, text, out = run("--profile.flops", "--train.epochs", 1, "--train.batch-size", 12)
    check_refused(codes, text, out, "needs a run of at least 4 steps, and this one makes 1")
    assert "loading weights" not in text and not out.exists()


def test_a_place_that_cannot_be_written_is_named():
    with pytest.raises(UserError, match=r"--profile\.trace-dir /proc/t cannot be written"):
        ProfileConfig(trace_dir=Path("/proc/t")).make_folders()


# ---------------------------------------------------------------------------------------------------------------------
# out of memory


def test_what_is_out_of_memory():
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**50)
    assert out_of_memory(of_torch.value) == f"out of memory, asked for another {2**52 / 2**20:.4g} MiB"
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(2**55)
    assert out_of_memory(of_numpy.value).startswith("out of memory")
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")) == (
        "out of memory, asked for another 2560 MiB"
    )
    assert out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_a_context_that_no_memory_holds():
    model = random_model()
    packed = pack(documents_of([20, 30]), 10**10, 0)  # in no time
    check_context_fits(packed, model, torch.float32, "cpu")
    endless = replace(packed, lengths=np.array([10**10]))
    with pytest.raises(
        UserError, match=r"--data.context-length 10000000000: .* 10,000,000,000 tokens, .* than 3,576 GiB"
    ):
        check_context_fits(endless, model, torch.float32, "cpu")
    with pytest.raises(UserError, match="than 1,192 GiB"):  # of one block, the only one that trains
        model.requires_grad_(False).model.layers[2].requires_grad_(True)
        check_context_fits(endless, model, torch.float32, "cpu")


def holding(mesh, tmp_path):
    model = random_model()
    optimizer = make_optimizer(model.parameters(), OptimConfig())
    packed = pack(documents_of([20]), 20, 0)
    batch_loss(model, collate(packed, [0], 0, "cpu")).backward()
    optimizer.step()
    optimizer.zero_grad()
    batch_loss(model, collate(packed, [0], 0, "cpu")).backward()
    held = held_bytes(list(model.parameters()), optimizer, "cpu")
    parameters = 4 * sum(p.numel() for p in model.parameters())
    assert held["parameters"] == held["gradients"] == parameters
    assert 0 <= held["optimizer state"] - 2 * parameters < 1000  # and the count of steps
    assert list(held)[:2] == [REST, "optimizer state"]  # Python and PyTorch are larger

    def helps(fsdp, device="cuda", **sizes):
        config = RunConfig(tmp_path, tmp_path, train=TrainConfig(batch_size=6, accumulate=2))
        return remedies({name.replace("_", " "): size for name, size in sizes.items()}, config, fsdp, device)

    few = "recipes/lora_fsdp.py, which trains fewer weights"
    assert helps(FsdpConfig(strategy="no-shard"), parameters=60, gradients=40) == [
        "--fsdp.strategy full-shard on more processes",
        "--fsdp.cpu-offload",
        few,
    ]
    sharded = FsdpConfig(strategy="full-shard", cpu_offload=True)
    assert helps(sharded, optimizer_state=60, parameters=3) == ["more processes", "--optim.kind anyprecision", few]
    tokens = ["--train.batch-size 3 --train.accumulate 4", "--fsdp.recompute full", "--data.context-length below 4096"]
    assert helps(sharded, "cpu", **{REST: 90, "parameters": 10}) == [*tokens, "more processes"]
    assert helps(FsdpConfig(recompute="full"), **{REST: 9})[1:] == tokens[2:]
    assert helps(sharded, **{FRAGMENTS: 9}) == ["PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment"]
    return True


def test_what_holds_memory_and_what_helps(tmp_path):
    assert run_ranks(holding, 1, tmp_path) == [True]


LIMITED = """
import os, resource, runpy, sys
from dataclasses import replace
import minillama.training.step as train
step = train.train_step

def limited(model, optimizer, batches, **kwargs):
    if os.environ["RANK"] == "1":
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        names = ("tokens", "positions", "document_ids", "labels")
        longer = {{name: getattr(batches[0], name).repeat(1, 200) for name in names}}
        batches = [replace(batches[0], **longer), *batches[1:]]
    return step(model, optimizer, batches, **kwargs)

train.train_step = limited
sys.argv[0] = {recipe!r}
runpy.run_path({recipe!r}, run_name="__main__")
"""


def test_a_rank_that_runs_out_of_memory_ends_all_with_one_message(tiny_folder, tmp_path):
    """Rank 1 can get no more memory in its first step, which needs much; the other waits in a collective, or soon will."""
    script = tmp_path / "limited.py"
    script.write_text(LIMITED.format(recipe=str(RECIPES / "full_fsdp.py")))
    flags = ("--model", tiny_folder, "--output-dir", tmp_path / "out", "--device", "cpu", "--fsdp.precision", "fp32")
    flags += ("--train.batch-size", 8, "--data.context-length", 1024, "--eval.no-enabled", "--checkpoint.every", -1)
    codes, text = run_script(script, *flags, world_size=2, log=tmp_path / "log")
    check_refused(codes, text, tmp_path / "out", "out of memory, asked for another", trained=True)
    [message] = [line for line in text.splitlines() if line.startswith("error: ")]
    assert re.search(r"rank 1 holds [\d.]+ GiB: activations and all else [\d.]+, ", message)
    assert "most first: --train.batch-size 4 --train.accumulate 2; --fsdp.recompute full; " in message
    assert (tmp_path / "out/metrics.jsonl").read_text() == ""


def test_elsewhere_running_out_of_memory_is_said_too(tmp_path):
    script = tmp_path / "greedy.py"
    script.write_text(
        "import torch\nfrom minillama.parallel.failures import user_errors\nwith user_errors():\n    torch.empty(2**50)\n"
    )
    codes, text = run_script(script, log=tmp_path / "log")
    assert codes == [1] and text.startswith("error: out of memory, asked for another 4.295e+09 MiB: ")
