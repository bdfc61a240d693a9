"""tools/gpu_check.py: what a CPU can of it, and that nothing that goes wrong is passed over."""

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script

TOOL = Path(__file__).parents[1] / "tools" / "gpu_check.py"


def test_on_a_cpu(tmp_path, tool):
    """All of it but compilation, which takes a minute, and the recipe, which tests/test_recipes.py runs."""
    groups = [group for group in tool.GROUPS if group not in ("compile", "recipe", "performance")]
    flags = ["--device", "cpu", "--only", *groups, "performance", "--minutes", 0]
    codes, text = run_script(TOOL, *flags, "--output", tmp_path / "gpu_check.json", log=tmp_path / "log")
    assert codes == [0], text
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    rows = found["checks"]
    assert {row["group"] for row in rows} == {*groups, "performance"}
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["device"] == "cpu"
    for row in rows:
        what = f"{row['group']}: {row['check']}"
        assert what in text
        if row["result"] == "passed":
            assert row["error"] <= row["tolerance"], row
        else:
            assert row["result"] == "not run" and row["error"] is None and row["detail"], row
    heads = ("8 heads", "8 query heads on 2")
    of_cuda = {f"attention: varlen, {dtype}, {head}" for dtype in ("fp32", "bf16", "fp16") for head in heads}
    of_cuda |= {f"attention: flex, {dtype}, {heads[1]}" for dtype in ("fp32", "bf16", "fp16")}
    of_cuda |= {f"attention: flex, fp32, {heads[0]}", "memory: running out is explained"}
    of_cuda |= {"checkpoint: the kernel that auto takes: 4 steps, 2 of them after resuming"}
    of_cuda |= {f"sync: places where a step waits for the device, {way}-shard" for way in ("full", "no")}
    of_cuda |= {f"performance: tiny {method} 128 eager" for method in ("lora", "full")}  # no time is given for these
    assert {f"{row['group']}: {row['check']}" for row in rows if row["result"] == "not run"} == of_cuda
    passed = [row["check"] for row in rows if row["result"] == "passed"]
    assert found["passed"] == len(passed) and found["failed"] == 0 and found["not_run"] == len(rows) - len(passed)
    for check in ("math, bf16, 8 query heads on 2", "LoRA on the head, fp32", "2 processes, hybrid-shard, full"):
        assert check in passed
    assert f"{len(passed)} passed, 0 failed" in text.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_without_a_gpu_it_says_so(tmp_path):
    codes, text = run_script(TOOL, "--output", tmp_path / "gpu_check.json", log=tmp_path / "log")
    assert codes == [1] and not (tmp_path / "gpu_check.json").exists()
    assert text == "error: this machine has no CUDA device that PyTorch can use; --device cpu checks what a CPU can\n"


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent / "gpu_check_parts"))
    import checks

    yield checks
    del sys.modules["checks"]


def test_what_becomes_of_a_check(parts):
    def raising():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def impossible():
        raise parts.NotRun("no such thing here")

    def row(measure, tolerance=1e-3, skip=""):
        found = parts.run(parts.Check("group", "name", measure, tolerance, skip))
        json.dumps(found, allow_nan=False)
        return found["result"], found["error"], found["detail"]

    assert row(lambda: 1e-3) == ("passed", 1e-3, "")
    assert row(lambda: (2e-3, "of q")) == ("failed", 2e-3, "of q")
    assert row(lambda: (math.nan, "of q")) == ("failed", None, "nan of q")
    assert row(lambda: math.inf) == ("failed", None, "inf")
    assert row(lambda: 7.0, tolerance=None) == ("measured", 7.0, "")
    assert row(raising) == ("failed", None, "OutOfMemoryError: CUDA out of memory")
    assert row(impossible) == ("not run", None, "no such thing here")
    assert row(raising, skip="needs CUDA") == ("not run", None, "needs CUDA")


def test_errors_are_relative_and_the_worst_is_named(parts):
    ones = torch.ones(4)
    assert parts.distance(1.5 * ones, ones) == 0.5 and parts.distance(0 * ones, 0 * ones) == 0
    assert parts.distance(ones, 0 * ones) == math.inf and math.isnan(parts.distance(math.nan * ones, ones))
    assert parts.worst({"a": 1.0, "b": 2.0, "c": 0.0}) == (2.0, "b")
    assert parts.worst({"a": 1.0, "b": math.nan, "c": 3.0})[1] == "b"


PROCESS = """
import json, os, sys, time
job = json.loads(sys.stdin.readline())
def say(**values):
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(values), flush=True)
names = ["sound", "fatal", "other", "endless", "last"]
say(names=[["group", name, 0.1] for name in names])
for number in range(job["first"], len(names)):
    say(begins=number)
    if names[number] == "fatal" and os.environ.get("RANK", "0") in ("0", "1"[: job["processes"] - 1]):
        sys.exit("CUDA error: an illegal memory access")
    while names[number] == "endless" or names[number] == "fatal":
        time.sleep(1)
    say(row={"group": "group", "check": names[number], "tolerance": 0.1, "error": 0.0, "result": "passed",
             "detail": "", "seconds": 0.0})
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_that_die_or_hang_fail_one_check(tool, tmp_path, monkeypatch, processes, capsys):
    (tmp_path / "gpu_check_parts").mkdir()
    (tmp_path / "gpu_check_parts" / "__main__.py").write_text(PROCESS)
    monkeypatch.setattr(tool, "TOOLS", tmp_path)
    monkeypatch.setattr(tool, "PATIENCE", 2)
    report = tool.Report(tmp_path / "out.json", {})
    began = time.monotonic()
    tool.correctness({"processes": processes}, report)
    assert time.monotonic() - began < 60
    rows = json.loads((tmp_path / "out.json").read_text())["checks"]
    assert [(row["check"], row["result"]) for row in rows] == [
        ("sound", "passed"),
        ("fatal", "failed"),
        ("other", "passed"),
        ("endless", "failed"),
        ("last", "passed"),
    ]
    assert rows[1]["detail"] == "its process ended with code 1: CUDA error: an illegal memory access"
    assert rows[3]["detail"] == "hangs: no answer in 2 s"
    assert report.count("failed") == 2


def test_a_device_that_is_lost_ends_the_checks(tool, tmp_path, monkeypatch):
    names = {"names": [["group", name, 0.1] for name in ("first", "last")]}
    answers = [names, {"begins": 0}, tool.Ended("CUDA error: the device is lost"), tool.Ended("CUDA error: no device")]

    def answer():
        if isinstance(answers[0], Exception):
            raise answers.pop(0)
        return answers.pop(0)

    processes = SimpleNamespace(answer=answer, close=lambda: None)
    monkeypatch.setattr(tool.Workers, "start", lambda job: processes)
    report = tool.Report(tmp_path / "out.json", {})
    tool.correctness({"processes": 1}, report)
    assert [(row["check"], row["detail"]) for row in report.rows] == [
        ("first", "CUDA error: the device is lost"),
        ("a process that makes checks", "CUDA error: no device"),
    ]
    assert report.count("failed") == 2


def test_speed(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)  # neither transformers nor peft
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    report = tool.Report(tmp_path / "out.json", {})
    flags = argparse.Namespace(shapes=["tiny"], modes=["eager"], methods=["lora"], contexts=[64, 32], minutes=5)
    tool.performance(flags, "cpu", time.monotonic(), report)
    text = capsys.readouterr().out
    assert "not beside transformers + peft: transformers and peft not installed" in text
    cases = json.loads((tmp_path / "out.json").read_text())["performance"]
    assert [(case["batch_size"], case["context_length"], case["mode"]) for case in cases] == [
        (1, 64, "eager"),
        (2, 32, "eager"),
    ]
    for case in cases:
        ours = case["contenders"]["ours"]
        assert ours["tokens_per_s"]["median"] == statistics.median(ours["turns"])
        assert 0 < ours["mfu"] < 1 and 0.1 < ours["peak_gib"] < 4  # a Python process with PyTorch, and a tiny model
    assert "tiny lora 1 x 64, packed documents" in text
    del sys.modules["bench"]
