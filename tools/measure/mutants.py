"""Which faults the tests do not see: changes a number, sign, comparison, condition, dtype, reduction or seed, and runs them.

    python tools/measure/mutants.py --file minillama/model/loss.py --tests tests/test_loss.py tests/test_lora.py --sample 25

Prints a line a mutant: whether a test failed, where and what was changed, seconds, the test. All happens in a copy of the
files that git knows. A process that has made the slow imports, none of them minillama's, forks for each mutant and rank.
"""

import ast
import copy
import gc
import importlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing import forkserver
from pathlib import Path

import tyro

IMPORTS = (
    "torch._dynamo torch.distributed.fsdp torch.distributed.tensor torch.distributed.checkpoint peft tiktoken pytest"
)
IMPORTS += " transformers.models.llama.modeling_llama matplotlib.figure jinja2"
PAIRS = "Add-Sub Mult-Div And-Or Lt-LtE Gt-GtE Eq-NotEq Is-IsNot In-NotIn BitAnd-BitOr FloorDiv-Mod"
PAIRS += " sum-mean any-all max-min amax-amin SUM-MAX float32-bfloat16 int64-int32 float64-float16"
OTHER = dict(pair.split("-") for pair in PAIRS.split())
OTHER |= {b: a for a, b in OTHER.items()} | {"Pow": "Mult"}
CASTS = ("float", "double", "to", "int", "bfloat16", "clamp", "clamp_")


@dataclass(frozen=True)
class Mutants:
    """Faults of one file that its tests do not see."""

    file: Path
    """The file to change."""
    tests: list[str]
    """What covers it, as pytest names it, the fastest first."""
    sample: int = 25
    """How many of all changes; 0: all."""
    seed: int = 0
    """Which they are."""
    replace: tuple[str, str] | None = None
    """Instead: this text by that one."""


def changes(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Pairs of a node and what to put in its place; of nothing in an annotation or in what is raised."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):  # parents before their children
        hidden = (getattr(node, name, None) for name in ("annotation", "returns", "exc"))
        skipped.update(ast.iter_child_nodes(node) if node in skipped else (child for child in hidden if child))
        if node in skipped:
            continue
        other = OTHER.get(type(getattr(node, "op", None)).__name__)
        match node:
            case ast.Constant(value=bool(value)):
                yield node, ast.Constant(not value)
            case ast.Constant(value=int() | float() as value):
                yield node, ast.Constant(value + 1 if isinstance(value, int) else 2 * value or 1.0)
            case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
                yield node, operand
            case ast.BinOp(left=left) | ast.BoolOp(values=[left, *_]) if other:
                yield from ((node, changed(node, op=getattr(ast, other)())), (node, left))
            case ast.AugAssign() if other:
                yield node, changed(node, op=getattr(ast, other)())
            case ast.Compare(ops=[op, *rest]) if other := OTHER.get(type(op).__name__):
                yield node, changed(node, ops=[getattr(ast, other)(), *rest])
            case ast.Attribute(attr=name) if name in OTHER:
                yield node, changed(node, attr=OTHER[name])
            case ast.Name(id=name) if name in OTHER:
                yield node, ast.Name(OTHER[name])
            case ast.Call(func=ast.Attribute(attr=name, value=value)) if name in CASTS:
                yield node, value
            case ast.Call(func=ast.Attribute(attr="encode", value=ast.JoinedStr(values=values) as text)):  # a seed's
                yield from ((text, changed(text, values=[v for v in values if v is not part])) for part in values)
            case ast.Expr(value=ast.Call()):
                yield node, ast.Pass()
            case ast.If(test=test) | ast.IfExp(test=test):
                yield from ((test, ast.Constant(value)) for value in (True, False))


def changed(node: ast.AST, **fields: object) -> ast.AST:
    node = copy.copy(node)
    node.__dict__.update(fields)
    return node


def texts(source: str, config: Mutants) -> list[tuple[int, int, str]]:
    """Start, end and new text of each change, in bytes of the source."""
    if config.replace:
        old, new = config.replace
        start = source.encode().index(old.encode())
        return [(start, start + len(old.encode()), new)]
    starts = [0, *accumulate(len(line.encode()) for line in source.splitlines(keepends=True))]
    found = []
    for node, other in changes(ast.parse(source)):
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        text = ast.unparse(other)
        found.append((start, end, text if isinstance(other, ast.stmt | ast.JoinedStr) else f"({text})"))
    return random.Random(config.seed).sample(found, min(config.sample or len(found), len(found)))


def run(tests: list[str]) -> tuple[int, str]:
    """pytest's exit code in a fork, minus the signal's number where one ended it, and the first test that failed."""
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", Path("log").read_text(), re.M)
        return code, failed[1] if failed else ""
    signal.alarm(300)  # a mutant may never end
    # The server of ranks is there, but a process that is not its parent cannot wait for it.
    forkserver.ensure_running = forkserver.ForkServer.ensure_running = lambda *_: None
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    options = "-xq -oaddopts= -pno:cacheprovider -pno:xdist -Wignore::pytest.PytestAssertRewriteWarning --basetemp=tmp"
    try:
        code = importlib.import_module("pytest").main([*tests, *options.split()])
    except BaseException:
        code, _ = 1, traceback.print_exc()
    os._exit(code)


def measure(config: Mutants) -> None:
    source, (code, failed) = config.file.read_text(), run(config.tests)
    if code:
        sys.exit(f"{failed or 'pytest'} fails without a change:\n{Path('log').read_text()[-2000:]}")
    for start, end, text in texts(source, config):
        data, began = source.encode(), time.perf_counter()
        config.file.write_bytes(data[:start] + text.encode() + data[end:])
        code, failed = run(config.tests)
        before, line = " ".join(data[start:end].decode().split()), data[:start].count(b"\n") + 1
        said = f"{'killed' if code else 'ALIVE '} {config.file}:{line}: {before:.60} -> {text:.60}"
        print(f"{said}  {time.perf_counter() - began:.1f} s {failed}", flush=True)


def main() -> None:
    config = tyro.cli(Mutants)
    known = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "-z"], text=True).split("\0")
    with tempfile.TemporaryDirectory() as folder:
        for name in (name for name in known if os.path.isfile(name)):
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, Path(folder) / name)
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": f"{folder}:{folder}/tests", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        os.environ |= dict.fromkeys(("MINILLAMA_TEST_CACHE", "XDG_CACHE_HOME", "HF_DATASETS_CACHE"), f"{folder}/cache")
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a mutant has the size and the second of another
        sys.path[:0], sys.dont_write_bytecode = [folder, f"{folder}/tests"], True
        forkserver.set_forkserver_preload(IMPORTS.split())
        forkserver.ensure_running()
        for name in IMPORTS.split():
            importlib.import_module(name)
        gc.freeze()  # a fork copies no page of theirs
        measure(config)


if __name__ == "__main__":
    main()
