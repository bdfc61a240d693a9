"""How a process ends when something is wrong: what is said, and that it is said once however many ranks there are."""

import io
import os
import platform
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from minillama.errors import REMEDIES, UserError, disk_text
from minillama.parallel.cut_files import tell_of_cut_files


def rank() -> int:
    """This process's rank as the launcher says, 0 without one; needs no process group."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the process with code 1 on a UserError, printed without a traceback, and once however many ranks make it; with
    130 on Ctrl-C, with 141 if nobody reads what it prints. Any other exception is printed once, by the rank that had it.
    What the terminal's encoding lacks is printed as an escape."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    tell_of_cut_files(_tell)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as the scripts have it until all is imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        _close_bars()
        if rank() == 0:
            print("\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # whoever reads our output has seen enough
        _speaks_first()
        with suppress(io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as error:
        _end(str(error))
    except OSError as error:
        if error.filename is None and error.errno not in REMEDIES:
            _end_of_fault()
        _end(disk_text(error))
    except (RuntimeError, MemoryError) as error:
        if _someone_erred():  # the others are gone because of a mistake that one has named
            sys.exit(1)
        if problem := out_of_memory(error):
            _end(f"{problem}: share it among more processes, or use what has more memory")
        if "onnection" in str(error) or isinstance(error, dist.DistError):
            _end_if_lost(error)
        _end_of_fault()
    except Exception:
        _end_of_fault()


def _end(message: str) -> NoReturn:
    """Ends the process with code 1, and says why unless another rank has."""
    _tell(message)
    sys.exit(1)


def _close_bars() -> None:
    """Progress bars end: else what is said next stands in their line, or they are drawn once more below it."""
    progress = sys.modules.get("tqdm")  # the model alone does without
    for bar in [*getattr(progress and progress.tqdm, "_instances", ())]:
        bar.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Around what asks the store: where that has gone with rank 0, PyTorch would print a stack of its own."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _tell(message: str) -> None:
    _close_bars()
    if _speaks_first():
        line = "" if rank() == 0 else "\n"  # rank 0's progress bar may be open
        print(f"{line}error: {message}", file=sys.stderr, flush=True)


def _speaks_first() -> bool:
    """Whether no other rank has said what is wrong: all usually make the same mistake, but sometimes only one does."""
    if not dist.is_initialized():
        return rank() == 0
    try:
        with _quiet():
            return dist.distributed_c10d._get_default_store().add("minillama/errors", 1) == 1
    except dist.DistError:  # rank 0, which keeps the store without torchrun, has ended: it has spoken
        return False


def _end_of_fault() -> NoReturn:
    """Ends the process with code 1 because of a fault that is not the user's: its traceback, with the rank that had it."""
    _close_bars()
    if not _someone_erred() and (_speaks_first() or not dist.is_initialized()):
        print(f"rank {rank()} has failed; this is a fault of the program, please report it:", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
    sys.exit(1)


processes: list[tuple[str, int]] = []
"""(machine, process) of each rank"""


def _end_if_lost(error: Exception) -> None:
    """Ends the process with code 1 if another is gone; the first rank left on that machine says which.

    Returns if all are on this machine, and there: the connection is not at fault.
    """
    here, deadline = platform.node(), time.monotonic() + 1
    mine = [number for number, (machine, _) in enumerate(processes) if machine == here]
    gone: dict[int, str | None] = {}
    while not gone and time.monotonic() < deadline:  # connections close a moment before the process is gone
        gone = {number: how for number in mine if (how := _end_of_process(processes[number][1])) is not None}
        time.sleep(0.05)
    if not gone and len(mine) == len(processes):
        return
    left = [number for number in mine if number not in gone]
    _close_bars()
    if gone and all(how == "" for how in gone.values()):  # it has said why
        sys.exit(1)
    if gone and rank() == left[0]:
        names = ", ".join(f"rank {number}{how and f' ({how})'}" for number, how in gone.items())
        why = "out of memory perhaps, or killed by someone, unless it said why; see `dmesg`"
        print(f"\nerror: {names} is gone: {why}", file=sys.stderr)
    elif not gone and rank() == mine[0]:
        reason = str(error).partition("\n")[0]
        print(f"\nerror: a process of another machine is gone, see what it printed ({reason})", file=sys.stderr)
    sys.exit(1)


def _end_of_process(number: int) -> str | None:
    """How a process of this machine ended: "" if by itself, with an error; None if it lives."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "its process has ended"
    if fields[0] not in "ZX":
        return None
    code = int(fields[-1])
    return f"killed by {signal.Signals(code & 127).name}" if code & 127 else ""


def out_of_memory(error: BaseException) -> str | None:
    """What to say of it if it is PyTorch's or Python's way of saying that memory has run out; None if it is not."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    if not known:
        return None
    asked = re.search(r"allocate ([\d.]+) (bytes|[KMG]iB)", str(error))
    units = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    return "out of memory" + (
        f", asked for another {float(asked[1]) * units[asked[2]] / 2**20:.4g} MiB" if asked else ""
    )


def _someone_erred() -> bool:
    if not dist.is_initialized():
        return False
    try:
        with _quiet():
            return dist.distributed_c10d._get_default_store().check(["minillama/errors"])
    except dist.DistError:
        return False
