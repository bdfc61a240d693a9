"""A process of tools/gpu_check.py that runs checks, one after the other.

It reads a job, one line of JSON, from standard input, and answers with lines of JSON: {"names": [...]}, and then for each
check {"begins": number} and {"row": {...}}. Of several processes the first answers. It ends when it cannot go on:
after a CUDA error, and with several processes after any failure, because they may be at different points by then.
"""

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products that are the same each time

import torch
from checks import Check, Context, is_fatal, run
from kernels import kernel_checks
from model_parts import model_checks
from runs import run_checks, strategy_checks


def all_checks(context: Context) -> list[Check]:
    """In the order in which they run: small ones, and those that others depend on, come first."""
    if context.processes > 1:
        return strategy_checks(context)
    return [*kernel_checks(context), *model_checks(context), *run_checks(context)]


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply

    def reply(**values: Any) -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(values), file=replies, flush=True)

    job = json.loads(sys.stdin.readline())
    if job["device"] == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # at tiny shapes more threads only wait for each other: ten times the work
    with contextlib.ExitStack() as stack:
        context = Context(job["device"], Path(job["folder"]), stack, job["processes"])
        checks = [check for check in all_checks(context) if not job["only"] or check.group in job["only"]]
        reply(names=[[check.group, check.name, check.tolerance] for check in checks])
        for number in range(job["first"], len(checks)):
            reply(begins=number)
            row = run(checks[number])
            reply(row=row)
            if is_fatal(row) or (row["result"] == "failed" and context.processes > 1):
                os._exit(3)  # neither NCCL nor the other processes would let it end in order


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        os._exit(4)
