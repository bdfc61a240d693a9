"""Changes the library in one place at a time and runs the tests of that place: what no test notices is a gap in them.

    python tools/measure/mutants.py --count 200 --seed 0 --output mutants.jsonl
    python tools/measure/mutants.py --count 20 --seed 1 --output mutants.jsonl --only model/loss adapters/lora

A change is a number, a sign, a condition, a dtype, a reduction or a seed, chosen at random; it is made in a copy of the
repository. Each gets a line in the output: killed (by which test), hangs, or survived. A survivor either computes the same
as before, which a reader has to say, or needs a test. The same command goes on where it was stopped. Linux only.
"""

import ast
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # as tests/conftest.py has them
ROOT = Path(__file__).parents[2]

TESTS = {  # of a file of the library, the tests that are to notice, the quickest first
    "model/llama": "model recompute attention generate hf surgery",
    "model/rope": "model hf",
    "model/attention": "attention model packing fake_cuda",
    "model/blockwise": "attention model",
    "model/kv_cache": "generate model",
    "model/loss": "loss model train distributed",
    "model/elementwise": "model fake_cuda",
    "model/quant": "quant",
    "parallel/processes": "distributed faults transfer precision fake_cuda mistakes",
    "parallel/sharding": "distributed train surgery recipes fake_cuda",
    "parallel/initialise": "distributed lora",
    "parallel/recompute": "recompute distributed",
    "adapters/lora": "lora merge adapters dpo distributed quant recipes",
    "adapters/llama_adapter": "llama_adapter adapters distributed",
    "training/step": "train distributed fake_cuda dpo recipes",
    "training/plan": "packing train resume recipes",
    "training/loop": "recipes resume",
    "training/optim": "optim train",
    "training/checkpoint": "checkpoint resume faults",
    "training/checkpoint_index": "index checkpoint",
    "training/dpo": "dpo preference recipe_dpo",
    "data/packing": "packing datasets recipe_dpo",
    "data/batch": "packing datasets transfer train dpo",
    "data/permutation": "permutation packing",
    "tokenizer/chat": "chat chat_masks",
    "inference/generate": "generate recipe_generate",
}

OPERATORS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*"}
COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
COMPARISONS |= {ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"}
DTYPES = {"float32": "bfloat16", "bfloat16": "float32", "float64": "float32", "int64": "int32", "uint8": "int32"}
REDUCTIONS = {"SUM": "MAX", "MAX": "SUM", "sum": "mean", "mean": "sum", "amax": "amin", "any": "all", "all": "any"}
REDUCTIONS |= {"max": "min", "min": "max"}
SEEDS = {"manual_seed", "default_rng", "Random"}


@dataclass(frozen=True)
class Mutants:
    """Change the library in one place at a time and run the tests of that place."""

    output: Path
    """Where each change gets a line of JSON."""
    count: int = 200
    """How many changes, over all files."""
    seed: int = 0
    """Of the choice."""
    only: tuple[Literal[tuple(TESTS)], ...] = ()
    """Files of the library, such as model/loss, instead of all that have tests listed here."""
    seconds: float = 600
    """Within which the tests of a file end without a change. With one they hang if they take twice that time and 30 more."""


@dataclass(frozen=True)
class Change:
    kind: str
    start: int
    end: int
    text: str


def changes(source: str) -> Iterator[Change]:
    """Every change that can be made. Offsets are of bytes, as ast counts them."""
    encoded = source.encode()
    line_starts = [0]
    for line in encoded.splitlines(keepends=True):
        line_starts.append(line_starts[-1] + len(line))

    def begin(node: ast.expr) -> int:
        return line_starts[node.lineno - 1] + node.col_offset

    def end(node: ast.expr) -> int:
        return line_starts[node.end_lineno - 1] + node.end_col_offset

    def text(node: ast.expr) -> str:
        return encoded[begin(node) : end(node)].decode()

    def between(kind: str, left: ast.expr, right: ast.expr, new: str) -> Iterator[Change]:
        gap = encoded[end(left) : begin(right)].decode()
        operator = re.search(r"not in|is not|in|is|and|or|\*\*|//|[<>=!]=|[-+*/%<>]", gap)
        if operator:
            yield Change(kind, end(left) + operator.start(), end(left) + operator.end(), new)

    def walk(node: ast.AST) -> Iterator[Change]:
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
            return
        match node:
            case ast.Constant(value=bool(value)):
                yield Change("condition", begin(node), end(node), str(not value))
            case ast.Constant(value=int() | float()):
                yield Change("number", begin(node), end(node), f"({text(node)} + 1)")
            case ast.BinOp(op=op, left=left, right=right) if type(op) in OPERATORS:
                yield from between("sign", left, right, OPERATORS[type(op)])
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                yield Change("sign", begin(node), end(node), text(operand))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield Change("condition", begin(node), end(node), f"bool({text(operand)})")
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                yield from between("condition", left, right, COMPARISONS[type(op)])
            case ast.BoolOp(op=op, values=[left, right, *_]):
                yield from between("condition", left, right, "or" if isinstance(op, ast.And) else "and")
            case ast.If(test=ast.Name() | ast.Attribute() | ast.Call() as test):
                yield Change("condition", begin(test), end(test), f"not {text(test)}")
            case ast.IfExp(test=ast.Name() | ast.Attribute() | ast.Call() as test):
                yield Change("condition", begin(test), end(test), f"(not {text(test)})")
            case ast.Attribute(attr=name) if name in DTYPES:
                yield Change("dtype", end(node) - len(name), end(node), DTYPES[name])
            case ast.Attribute(attr=name) if name in REDUCTIONS:
                yield Change("reduction", end(node) - len(name), end(node), REDUCTIONS[name])
            case ast.Call(func=ast.Name(id=("max" | "min" | "any" | "all") as name)):
                yield Change("reduction", begin(node), begin(node) + len(name), REDUCTIONS[name])
            case ast.Call(func=ast.Attribute(attr="float", value=value), args=[]):
                yield Change("dtype", begin(node), end(node), text(value))
            case ast.Call(func=ast.Attribute(attr=name), args=[argument, *_]) if name in SEEDS:
                yield Change("seed", begin(argument), end(argument), "0")
        for name, child in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for each in child if isinstance(child, list) else [child]:
                if isinstance(each, ast.AST):
                    yield from walk(each)

    yield from walk(ast.parse(source))


def chosen(config: Mutants) -> list[tuple[str, Change]]:
    """From each file about as many as the square root of what there are, so that no long file takes most."""
    generator = random.Random(config.seed)
    found = {name: list(changes((ROOT / f"minillama/{name}.py").read_text())) for name in config.only or TESTS}
    weights = {name: len(all_of_it) ** 0.5 for name, all_of_it in found.items()}
    result = []
    for name, all_of_it in found.items():
        share = round(config.count * weights[name] / sum(weights.values()))
        result += [(name, change) for change in generator.sample(all_of_it, min(share, len(all_of_it)))]
    generator.shuffle(result)  # what has been done when it is stopped is of all files
    return result


def run_tests(copy: Path, tests: list[str], log: Path) -> None:
    """In a process of its own: a forked one has the imports below already."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path.insert(0, str(copy))
    import pytest

    flags = ["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    sys.exit(pytest.main([*flags, "--tb=line", *tests]))


def result_of(copy: Path, tests: list[str], seconds: float) -> dict[str, str]:
    log = copy / "log"
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(copy, tests, log))
    process.start()
    process.join(seconds)
    hangs = process.exitcode is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its children too
    process.join()
    if hangs:
        return {"result": "hangs"}
    if process.exitcode == 0:
        return {"result": "survived"}
    text = log.read_text(errors="replace")
    by = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    return {"result": "killed", "by": by[1] if by else text[-300:]}


def main(config: Mutants) -> None:
    import peft  # noqa: F401  what takes long to import and is not the library's
    import pytest  # noqa: F401
    import torch._dynamo
    import torch.distributed.fsdp  # noqa: F401
    import transformers  # noqa: F401

    done = set()
    if config.output.exists():
        rows = [json.loads(line) for line in config.output.read_text().splitlines()]
        done = {(row["file"], row["start"], row["after"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv*", "models", "__pycache__", "*.egg-info", "shared")
        shutil.copytree(ROOT, copy, ignore=ignored)
        if (ROOT.parent / "shared").exists():
            (Path(folder) / "shared").symlink_to((ROOT.parent / "shared").resolve())
        limits: dict[str, float] = {}
        for name, change in chosen(config):
            if (name, change.start, change.text) in done:
                continue
            file = copy / f"minillama/{name}.py"
            source = file.read_bytes()
            tests = [f"tests/test_{test}.py" for test in TESTS[name].split()]
            if name not in limits:  # without a change they pass, or every change would seem to be noticed
                began = time.monotonic()
                result = result_of(copy, tests, config.seconds)
                if result["result"] != "survived":
                    sys.exit(f"error: without a change, the tests of {name} fail: {result}")
                limits[name] = 30 + 2 * (time.monotonic() - began)
            file.write_bytes(source[: change.start] + change.text.encode() + source[change.end :])
            began = time.monotonic()
            result = result_of(copy, tests, limits[name])
            file.write_bytes(source)
            number = source[: change.start].count(b"\n")
            row = {"file": name, "line": number + 1, "kind": change.kind, "start": change.start}
            row |= {"before": source[change.start : change.end].decode(), "after": change.text}
            row |= {"code": source.decode().splitlines()[number].strip(), **result}
            row |= {"seconds": round(time.monotonic() - began, 1)}
            with config.output.open("a") as output:
                output.write(json.dumps(row) + "\n")
            print(*(row[key] for key in ("result", "file", "line", "before", "after", "seconds")), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Mutants))
