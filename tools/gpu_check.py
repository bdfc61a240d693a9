"""Checks on a GPU everything that minillama computes there, then measures its speed. One command, no files needed:

    python tools/gpu_check.py                                    everything, on all GPUs there are
    python tools/gpu_check.py --only attention loss              some groups of checks, see GROUPS
    python tools/gpu_check.py --only performance --shapes llama-3.1-8b --methods lora
    python tools/gpu_check.py --device cpu                       what can run on a CPU, at tiny shapes

Correctness comes first: one row a check, with the tolerance and the error found.
A check that cannot be made here is "not run", with the reason; one that raises, hangs or kills its process has failed, and
the others go on. Speed is measured by tools/bench.py, compared with transformers + peft if they are installed, with no new
case after --minutes. Results are printed and written to --output as they come. Ends with code 1 if a check has failed.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import platform
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import torch

from minillama.errors import UserError
from minillama.hardware.benchmark import processor

TOOLS = Path(__file__).parent
GROUPS = (
    *("setup", "attention", "loss", "optimizer", "model", "compile", "recompute", "fp16", "generation", "checkpoint"),
    *("profile", "memory", "sync", "strategies", "recipe", "performance"),
)
PATIENCE = 300
"""Seconds that a check may take before its processes are ended"""


# --- correctness, in processes of their own


@dataclass
class Workers:
    """Processes that make checks together; see tools/gpu_check_parts/__main__.py. The first one answers."""

    processes: list[subprocess.Popen[str]]
    log: IO[str]
    answers: "queue.Queue[str | None]"

    @classmethod
    def start(cls, job: dict[str, Any]) -> "Workers":
        env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        env |= {"PYTHONPATH": os.pathsep.join([str(TOOLS.parent), os.environ.get("PYTHONPATH", "")])}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        count = job["processes"]
        log, processes = tempfile.TemporaryFile("w+"), []  # noqa: SIM115  # closed by close()
        for rank in range(count):
            ranked = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            ranked |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = subprocess.Popen(
                [sys.executable, str(TOOLS / "gpu_check_parts")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env | ({key: str(value) for key, value in ranked.items()} if count > 1 else {}),
            )
            assert process.stdin
            with contextlib.suppress(BrokenPipeError), process.stdin as given:
                print(json.dumps(job), file=given)
            processes.append(process)
        answers: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert processes[0].stdout
            for line in processes[0].stdout:
                answers.put(line)
            answers.put(None)

        threading.Thread(target=read, daemon=True).start()
        return cls(processes, log, answers)

    def answer(self) -> dict[str, Any]:
        """The next line. Raises Ended, with the reason, where none comes."""
        deadline, code = time.monotonic() + PATIENCE, 0
        while time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                line = self.answers.get(timeout=0.5)
                if line is not None:
                    return json.loads(line)
                raise Ended(self.last_words(self.processes[0].wait()))
            gone = next((process.returncode for process in self.processes[1:] if process.poll()), 0)
            if gone and not code:  # the first may have failed with it, and say so, or wait for it forever
                deadline, code = time.monotonic() + 10, gone
        raise Ended(self.last_words(code) if code else f"hangs: no answer in {PATIENCE} s")

    def last_words(self, code: int) -> str:
        self.log.seek(0)
        said = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        return f"its process ended with code {code}: {said[-1] if said else ''}"

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
        self.log.close()


class Ended(Exception):
    """Why processes make no more checks."""


def correctness(job: dict[str, Any], say: "Report") -> None:
    """Makes all checks of a job; where its processes end, new ones go on after the check in which they did."""
    first, names = 0, None
    while names is None or first < len(names):
        workers = Workers.start(job | {"first": first})
        begun, before = None, first
        try:
            names = workers.answer()["names"]
            while first < len(names):
                begun = None
                begun = workers.answer()["begins"]
                say.row(workers.answer()["row"])
                first += 1
        except Ended as reason:
            if names is not None and begun is not None:
                say.row(failed(*names[begun], str(reason)))
                first = begun + 1
            elif first == before:  # before any check: no other process would get further
                say.row(failed("setup", "a process that makes checks", None, str(reason)))
                return
        finally:
            workers.close()


def failed(group: str, name: str, tolerance: float | None, detail: str) -> dict[str, Any]:
    row = {"group": group, "check": name, "tolerance": tolerance, "error": None, "result": "failed"}
    return row | {"detail": detail, "seconds": 0.0}


# --- performance, by tools/bench.py


def load_bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench", TOOLS / "bench.py")
    assert spec and spec.loader
    module = sys.modules["bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def performance(flags: argparse.Namespace, device: str, began: float, say: "Report") -> None:
    """Each shape with each method, context and mode, while there is time: those that tell most first."""
    bench = load_bench()
    known = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
    contenders = ("ours", "hf") if not known else ("ours",)
    if known:
        say.line(f"not beside transformers + peft: {' and '.join(known)} not installed")
    for shape, mode, method, length in itertools.product(flags.shapes, flags.modes, flags.methods, flags.contexts):
        name = f"{shape} {method} {length} {mode}"
        if time.monotonic() - began > 60 * flags.minutes:
            say.row(not_run("performance", name, f"the {flags.minutes:g} minutes are over"))
            continue
        asked = bench.Bench(
            shape=(shape,),
            method=(method,),
            context_length=(length,),
            documents="packed",
            batch_size=max(flags.contexts) // length,  # as many tokens in each case
            recompute="auto",
            compile=mode == "compiled",
            contenders=contenders,
            rounds=2,
            device=device,
        )
        settings = bench.resolved(asked)
        case = bench.run_case(settings, shape, method, length)
        say.case(case | {"mode": mode}, [bench.heading(settings, case), *bench.rows(case)])


def not_run(group: str, name: str, reason: str) -> dict[str, Any]:
    return failed(group, name, None, reason) | {"result": "not run"}


# --- what is said


class Report:
    """Prints results, and keeps all of them in a file at any time: a run that is stopped leaves its results."""

    def __init__(self, output: Path, machine: dict[str, Any]) -> None:
        self.output, self.machine = output, machine
        self.rows: list[dict[str, Any]] = []
        self.cases: list[dict[str, Any]] = []
        self.write()

    def line(self, text: str) -> None:
        print(text, flush=True)

    def row(self, row: dict[str, Any]) -> None:
        numbers = [f"{row[name]:9.2g}" if row[name] is not None else f"{'':9}" for name in ("tolerance", "error")]
        detail = row["detail"].replace("\n", " ")
        text = f"{row['result']:8} {' '.join(numbers)}  {row['group']}: {row['check']}  {detail[:300]}"
        self.line(text.rstrip())
        self.rows.append(row)
        self.write()

    def case(self, case: dict[str, Any], lines: list[str]) -> None:
        for line in lines:
            self.line(line)
        self.cases.append(case)
        self.write()

    def count(self, result: str) -> int:
        return sum(row["result"] == result for row in self.rows)

    def write(self) -> None:
        counts = {name.replace(" ", "_"): self.count(name) for name in ("passed", "failed", "not run", "measured")}
        found = {"machine": self.machine, **counts, "checks": self.rows, "performance": self.cases}
        new = self.output.with_name(self.output.name + ".new")
        new.write_text(json.dumps(found, indent=1) + "\n")
        new.replace(self.output)


def machine(device: str, processes: int) -> dict[str, Any]:
    found: dict[str, Any] = {"device": device, "processes": processes, "python": platform.python_version()}
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "capability": [properties.major, properties.minor]}
        found |= {"memory_gib": round(properties.total_memory / 2**30, 1), "gpus": torch.cuda.device_count()}
    else:
        found |= {"name": processor()["processor"], "cores": os.cpu_count()}
    for name in ("triton", "transformers", "peft", "tyro"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"), help="where the results go, as JSON")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", default=[], help=", ".join(GROUPS))
    parser.add_argument("--processes", type=int, default=0, help="of the strategies; 0: one a GPU, on a CPU two")
    parser.add_argument("--minutes", type=float, default=30, help="no new case of performance after so many")
    parser.add_argument(
        "--shapes", nargs="+", help="as tools/bench.py has them; by default Llama 1B, 3B, 8B; on a CPU tiny"
    )
    parser.add_argument("--methods", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--contexts", nargs="+", type=int, help="tokens; by default 2048 and 8192; on a CPU 128")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=[])
    return parser.parse_args()


def main(flags: argparse.Namespace) -> int:
    began = time.monotonic()
    available = torch.cuda.is_available()
    if flags.device != "cpu" and not available:
        raise UserError("this machine has no CUDA device that PyTorch can use; --device cpu checks what a CPU can")
    device = "cpu" if flags.device == "cpu" else "cuda"
    if flags.output.is_dir() or not os.access(flags.output.parent, os.W_OK):
        raise UserError(f"--output {flags.output} cannot be written")
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    processes = flags.processes or gpus or 2
    if device == "cuda" and processes > gpus:
        raise UserError(f"--processes {processes}: there are {gpus} GPUs, and a process needs one")
    flags.shapes = flags.shapes or (["llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"] if gpus else ["tiny"])
    flags.contexts = flags.contexts or ([2048, 8192] if gpus else [128])
    flags.modes = flags.modes or (["eager", "compiled"] if gpus else ["eager"])
    if unknown := set(flags.shapes) - load_bench().SHAPES.keys():
        raise UserError(f"--shapes {' '.join(sorted(unknown))}: there are {', '.join(load_bench().SHAPES)}")
    say = Report(flags.output, machine(device, processes))
    say.line("  ".join(f"{name} {value}" for name, value in say.machine.items()))
    say.line(f"{'':8} {'tolerance':>9} {'error':>9}")
    with tempfile.TemporaryDirectory() as folder:
        only = [group for group in flags.only if group != "performance"]
        job = {"device": device, "folder": folder, "only": only, "processes": 1}
        if only or not flags.only:
            correctness(job, say)
        if "strategies" in only or not flags.only:
            if processes > 1:
                correctness(job | {"processes": processes, "only": ["strategies"]}, say)
            else:
                say.row(not_run("strategies", "several processes as one", "one GPU: it takes two"))
    if "performance" in flags.only or not flags.only:
        performance(flags, device, began, say)
    counts = ", ".join(f"{say.count(result)} {result}" for result in ("passed", "failed", "not run", "measured"))
    say.line(f"{counts}; {time.monotonic() - began:.0f} s; {flags.output}")
    return 1 if say.count("failed") else 0


if __name__ == "__main__":
    from minillama.parallel.failures import user_errors

    with user_errors():
        sys.exit(main(parse()))
