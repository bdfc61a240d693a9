"""Which faults the tests do not see: changes a number, sign, comparison, condition, dtype, reduction or seed, and runs them.

    python tools/measure/mutants.py minillama/model/loss.py --sample 25 -- tests/test_loss.py tests/test_lora.py

Prints a line a mutant: whether a test failed, where and what was changed, seconds, the test. Tests are collected once. Each
mutant is a fork in which the changed function's code is replaced, and that runs the tests that reach its line, quickest
first; ranks are forks of that. What modules and classes do when they are made is not changed, but for their constants.
"""

import argparse
import ast
import copy
import gc
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate
from multiprocessing import forkserver
from pathlib import Path
from types import CodeType, FunctionType

import pytest

PAIRS = "Add-Sub Mult-Div And-Or Lt-LtE Gt-GtE Eq-NotEq Is-IsNot In-NotIn BitAnd-BitOr FloorDiv-Mod"
PAIRS += " sum-mean any-all max-min amax-amin SUM-MAX float32-bfloat16 int64-int32 float64-float16"
OTHER = dict(pair.split("-") for pair in PAIRS.split())
OTHER |= {b: a for a, b in OTHER.items()} | {"Pow": "Mult"}
CASTS = ("float", "double", "to", "int", "bfloat16", "clamp", "clamp_", "detach")


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


def texts(source: str, sample: int, seed: int) -> list[tuple[int, int, str]]:
    """Start, end and new text of each change, in bytes of the source; no line moves."""
    starts = [0, *accumulate(len(line.encode()) for line in source.splitlines(keepends=True))]
    found = []
    tree = ast.parse(source)
    tree.body = [part for part in tree.body if isinstance(part, ast.FunctionDef | ast.ClassDef)]
    for node, other in changes(tree):
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        text = ast.unparse(other) if isinstance(other, ast.stmt | ast.JoinedStr) else f"({ast.unparse(other)})"
        lines = "\n" * (node.end_lineno - node.lineno)
        found.append((start, end, f"{text[:-1]}{lines})" if text.endswith(")") else text + lines))
    return random.Random(seed).sample(found, min(sample or len(found), len(found)))


def codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from codes(part)


def functions_of(file: str) -> list[FunctionType]:
    return [x for x in gc.get_objects() if type(x) is FunctionType and x.__code__.co_filename == file]


def apply(file: str, source: str, functions: list[FunctionType]) -> int:
    """Gives every function of the file its code in this source, constants their value: how many have changed."""
    new, count = defaultdict(list), 0
    for code in codes(compile(source, file, "exec")):
        new[code.co_qualname, code.co_firstlineno].append(code)
    for function in functions:
        own = function.__code__
        for code in new[own.co_qualname, own.co_firstlineno]:
            if code != own and code.co_freevars == own.co_freevars:
                function.__code__, count = code, count + 1
    [module] = [m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == file]
    made = {"__name__": module.__name__, "__file__": file}
    if not count:  # a constant, or a default
        exec(compile(source, file, "exec"), made)
    for name, value in made.items():
        old = getattr(module, name, None)
        if isinstance(value, int | float | str | tuple | dict) and value != old and not name.startswith("__"):
            for other in [m for m in list(sys.modules.values()) if getattr(m, name, None) is old]:
                setattr(other, name, value)
                count += 1
        functions = (
            [(old, value), *((vars(old)[k], v) for k, v in vars(value).items() if k in vars(old))]
            if isinstance(value, type) and isinstance(old, type)
            else [(old, value)]
        )
        for a, b in functions:
            for of in ("__defaults__", "__kwdefaults__"):
                if isinstance(b, FunctionType) and isinstance(a, FunctionType) and getattr(a, of) != getattr(b, of):
                    setattr(a, of, getattr(b, of))
                    count += 1
    return count


class Mutants:
    """A plugin of pytest that runs the tests once for each mutant."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags, self.file = flags, str(flags.file.absolute())

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.session, conftest = session, sys.modules["conftest"]
        self.functions = functions_of(self.file)
        gc.collect()
        gc.freeze()  # a fork copies no page of theirs
        conftest._context = multiprocessing.get_context("fork")
        forkserver.ensure_running = lambda: None
        reached, source = self.baseline(conftest), self.flags.file.read_text()
        changes = [self.flags.replace] if self.flags.replace else texts(source, self.flags.sample, self.flags.seed)
        for number, change in enumerate(changes):
            if self.flags.replace:
                start = source.encode().index(change[0].encode())
                change = start, start + len(change[0].encode()), change[1]
            start, end, text = change
            data = source.encode()
            first, last = (data[:place].count(b"\n") + 1 for place in (start, end))
            items = [
                item for item in session.items if reached.get(item.nodeid, (0, set()))[1] & {*range(first, last + 1)}
            ]
            tops = [s for s in ast.parse(source).body if s.lineno <= first <= s.end_lineno]
            if not items or not any(isinstance(s, ast.FunctionDef | ast.ClassDef) for s in tops):
                items = [item for item in session.items if item.nodeid in reached]
            items.sort(key=lambda item: reached[item.nodeid][0])
            began = time.perf_counter()
            code, failed = self.fork(
                lambda: self.mutant(items, (data[:start] + text.encode() + data[end:]).decode()), 300
            )
            before, text = (" ".join(t.split()) for t in (data[start:end].decode(), text))
            said = {0: "ALIVE ", 1: "killed", 2: "NONE  "}.get(code, f"ended {code}")
            print(
                f"{number:3} {said} {self.flags.file}:{first}: {before:.60} -> {text:.60}",
                end="  ",
                file=self.flags.out,
            )
            print(f"{time.perf_counter() - began:.1f} s {failed}", file=self.flags.out, flush=True)
        return True

    def fork(self, task, seconds: int):
        there = Path(f"/tmp/mutants-{os.getpid()}")
        there.write_text('""')
        if not (pid := os.fork()):
            os.setsid()
            signal.alarm(seconds)
            try:
                result = task()
                there.write_text(json.dumps(result[1]))
                os._exit(result[0])
            finally:
                os._exit(70)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        try:
            os.killpg(pid, signal.SIGKILL)  # its ranks, where it left some
        except ProcessLookupError:
            pass
        return code, json.loads(there.read_text())

    def run(self, items) -> str:
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.session.testsfailed:
                return item.nodeid
        return ""

    def mutant(self, items, source: str) -> tuple[int, str]:
        try:
            if not apply(self.file, source, self.functions):
                return 2, ""
        except Exception as error:
            return 1, f"as it is made: {error!r}"
        failed = self.run(items)
        return (1 if failed else 0), failed

    def baseline(self, conftest):
        """Of each test that passes: its seconds, and which lines of the file it or its ranks reach."""
        folder = Path(f"/tmp/mutants-lines-{os.getpid()}")
        folder.mkdir(exist_ok=True)

        def all_of() -> tuple[int, dict]:
            lines: set[int] = set()

            def trace(frame, event, argument):
                if frame.f_code.co_filename != self.file:
                    return None
                lines.add(frame.f_lineno)
                return trace

            child = conftest._child

            def rank(*args):
                lines.clear()
                try:
                    child(*args)
                finally:
                    (folder / str(os.getpid())).write_text(json.dumps(sorted(lines)))

            conftest._child = rank
            sys.settrace(trace)
            threading.settrace(trace)
            found = {}
            for item, following in zip(self.session.items, [*self.session.items[1:], None], strict=True):
                lines.clear()
                before, began = self.session.testsfailed, time.process_time()
                item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
                of_ranks = [json.loads(file.read_text()) for file in folder.iterdir()]
                for file in folder.iterdir():
                    file.unlink()
                if self.session.testsfailed == before:
                    found[item.nodeid] = time.process_time() - began + 2 * len(of_ranks), sorted(lines.union(*of_ranks))
            return 0, found

        code, found = self.fork(all_of, 1500)
        print(
            f"{len(self.session.items)} tests, {len(found)} pass, {sum(s for s, _ in found.values()):.0f} s {code}",
            file=self.flags.out,
            flush=True,
        )
        return {name: (seconds, set(lines)) for name, (seconds, lines) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="the file to change")
    parser.add_argument("tests", nargs="+", help="what covers it, as pytest names it")
    parser.add_argument("--sample", type=int, default=25, help="how many of all changes; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="which they are")
    parser.add_argument("--replace", nargs=2, help="instead: this text by that one")
    parser.add_argument("--out", type=argparse.FileType("a"), default=os.dup(1))
    flags = parser.parse_args()
    multiprocessing.set_start_method("fork")
    options = ["-q", "-oaddopts=", "-pno:cacheprovider", "-pno:xdist", "-Wignore::pytest.PytestAssertRewriteWarning"]
    sys.exit(pytest.main([*flags.tests, *options], plugins=[Mutants(flags)]))


if __name__ == "__main__":
    main()
