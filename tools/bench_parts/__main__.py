"""A contender of tools/bench.py: a process that keeps its model and runs the commands it gets.

It reads a job, one line of JSON, from standard input, and then one command a line: {"first": n, "count": k} runs the steps
n to n + k - 1 and answers with their seconds, losses and so on. The number of a step and the name of a parameter are its
random seed, so all contenders train the same model on the same tokens, and their losses can be compared.
"""

import contextlib
import json
import os
import re
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from work import Job, compute_dtype, make_model, make_work

from minillama.errors import UserError
from minillama.hardware.benchmark import matmul_rate
from minillama.parallel.memory import peak_memory_gib
from minillama.training.flops import step_flops


def make_contender(job: Job, stack: contextlib.ExitStack) -> Any:
    if job["loss"]:
        from losses import Loss

        return Loss(job, stack)
    match job["contender"], job["generate"]:
        case "ours" | "nf4" | "int8", False:
            from ours import Ours as Contender
        case "ours", True:
            from ours import OursGenerating as Contender
        case "hf", False:
            from peers import HuggingFace as Contender
        case "hf", True:
            from peers import HuggingFaceGenerating as Contender
        case "torchtune", False:
            from peers import Torchtune as Contender
        case "floor", False:
            from floor import Floor as Contender
        case name, _:
            raise UserError(f"{name} cannot do that")
    return Contender(job, stack)


def train(contender: Any, job: Job, first: int, count: int) -> dict[str, Any]:
    """Makes `count` steps. A step's seconds are from its samples on the host to its loss on the host; the floor, which
    has no loss, says itself what its parts took."""
    model, flops = make_model(job), 0.0
    seconds, results, parts = [], [], []
    cpu_seconds = 0.0
    for step in range(first, first + count):
        work = make_work(job, step)
        if job["loss"]:
            flops += (6 if job["method"] == "full" else 4) * model.lm_head.weight.numel() * work.trained
        else:
            flops += step_flops(model, work.tokens.numel(), work.trained, work.squares)
        if job["contender"] == "floor":
            parts.append(contender.step(work))
            seconds.append(sum(parts[-1].values()))
            continue
        synchronise(job)
        began, cpu_began = time.perf_counter(), time.process_time()
        results.append([value.item() for value in contender.step(work)])
        synchronise(job)
        seconds.append(time.perf_counter() - began)
        cpu_seconds += time.process_time() - cpu_began
        if job["contender"] in ("nf4", "int8"):
            parts.append({"dequantising": contender.dequantising_seconds() / seconds[-1]})
    found = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "flops": flops,
        "losses": [loss for loss, _ in results],
        "norms": [norm for _, norm in results],
        "parts": parts,
        "peak_gib": peak_gib(job),
    }
    return found | {"matmul_rate": matmul_rate(job["device"], compute_dtype(job))}


def generate(contender: Any, job: Job, first: int, count: int) -> dict[str, Any]:
    """Continues a prompt of random tokens by `count`."""
    [prompt] = make_work(job, first).tokens.tolist()
    began = time.perf_counter()
    answer = contender.generate(prompt, count)
    return {"seconds": time.perf_counter() - began, "answer": answer}


def synchronise(job: Job) -> None:
    if job["device"] == "cuda":
        torch.cuda.synchronize()


CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def forget_peak(job: Job) -> None:
    """Building the model, which may need more than a step, does not count."""
    if job["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5")


def peak_gib(job: Job) -> float:
    """Most memory since forget_peak: allocated on the CUDA device, or resident, libraries included."""
    if job["device"] == "cpu" and CLEAR.exists():  # ru_maxrss cannot be reset, and is at least the parent's
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
        assert found
        return int(found.group(1)) / 2**20
    return peak_memory_gib(job["device"])


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "peft", "torchtune", "torchao"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply

    def reply(**values: Any) -> None:
        print(json.dumps(values), file=replies, flush=True)

    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    try:
        with contextlib.ExitStack() as stack:
            contender = make_contender(job, stack)
            forget_peak(job)
            reply(versions=versions())
            for line in sys.stdin:
                reply(**(generate if job["generate"] else train)(contender, job, **json.loads(line)))
    except torch.OutOfMemoryError:
        reply(error="out of memory")
    except Exception as error:
        traceback.print_exc()
        reply(error=f"{'' if isinstance(error, UserError) else type(error).__name__ + ': '}{error}".splitlines()[0])


if __name__ == "__main__":
    main()
