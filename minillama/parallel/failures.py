"""How a process ends when something is wrong: one message, on however many ranks."""

import io
import json
import os
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
from minillama.parallel.heartbeat import Heartbeat, quiet


def rank() -> int:
    """This process's rank as the launcher says, 0 without one; needs no process group."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the process with code 1 on a UserError, printed without a traceback and once for all ranks; with 130 on Ctrl-C;
    with 141 if nobody reads its output. Any other exception is printed once, by the rank that raised it. Characters that
    the terminal's encoding lacks are printed as escapes."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    tell_of_cut_files(_tell)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as in the scripts until all is imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except SystemExit as end:
        if end.code == 2 and rank() == 0:  # the parser of the flags has said which
            _tell_torchrun("error: wrong flags, as is said above this report")
        raise
    except KeyboardInterrupt:
        _close_bars()
        if rank() == 0:
            print("\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader has closed the pipe
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
        if _someone_erred():  # the others ended because of a mistake that one has named
            sys.exit(1)
        if problem := out_of_memory(error):
            _end(f"{problem}: share it among more processes, or use what has more memory")
        if "onnection" in str(error) or isinstance(error, dist.DistError):
            _end_if_lost(error)
        if heart and "imed out" in str(error):
            _end_if_stuck(error)
        _end_of_fault()
    except Exception:
        _end_of_fault()


def _end(message: str) -> NoReturn:
    """Ends the process with code 1, and says why unless another rank has."""
    _tell(message)
    sys.exit(1)


def _close_bars() -> None:
    """Closes progress bars: else the next message would be in their line, or they would be drawn again below it."""
    progress = sys.modules.get("tqdm")  # not imported if only the model is used
    for bar in [*getattr(progress and progress.tqdm, "_instances", ())]:
        bar.close()


def _tell(message: str) -> None:
    _close_bars()
    if _speaks_first():
        line = "" if rank() == 0 else "\n"  # rank 0's progress bar may be open
        print_error(f"{line}error: {message}")


def print_error(text: str) -> None:
    """On whichever rank, and in torchrun's report."""
    print(text, file=sys.stderr, flush=True)
    _tell_torchrun(text.strip())


def _tell_torchrun(message: str) -> None:
    """Makes torchrun's report of a failed process end with this message.

    The file and its format are those of torch.distributed.elastic.multiprocessing.errors.record.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        when = int(time.time()) - 1  # the first to fail is the cause: before the ranks that end because of this one
        content = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(when)}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": content}))


def _speaks_first() -> bool:
    """Whether no other rank has printed the error: usually all have the same one, but sometimes only one has it."""
    if not heart:
        return rank() == 0
    try:
        with quiet():
            return heart[0].speaks_first()
    except dist.DistError:  # without torchrun rank 0 keeps the store: it has ended, and printed the error
        return False


def _end_of_fault() -> NoReturn:
    """Ends the process with code 1 because of a fault that is not the user's: prints its traceback and the rank."""
    _close_bars()
    if not _someone_erred() and (_speaks_first() or not heart):
        print(f"rank {rank()} has failed; this is a fault of the program, please report it:", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        what = traceback.format_exception_only(sys.exception())[0].strip()
        _tell_torchrun(f"rank {rank()} has failed, see its traceback above: {what}")
    sys.exit(1)


neighbours: dict[int, int] = {}
"""The process of each rank of this machine"""
heart: list[Heartbeat] = []
"""Of this process, if there are others"""


def _end_if_lost(error: Exception) -> None:
    """Ends the process with code 1 if another is gone; the first rank left on that machine says which.

    Returns if all are on this machine and alive: then the connection did not fail because of a dead process.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, when others have ended before this one has told why
    deadline = time.monotonic() + 1
    gone: dict[int, str | None] = {}
    while not gone and time.monotonic() < deadline:  # connections close a moment before the process ends
        gone = {number: how for number, pid in neighbours.items() if (how := _end_of_process(pid)) is not None}
        time.sleep(0.05)
    if not gone and (not heart or len(neighbours) == heart[0].world_size):
        return
    left = [number for number in neighbours if number not in gone]
    _close_bars()
    if gone and all(how == "" for how in gone.values()):  # it has said why
        sys.exit(1)
    if gone and rank() == left[0]:
        names = ", ".join(f"rank {number}{how and f' ({how})'}" for number, how in gone.items())
        why = "out of memory perhaps, or killed by someone, unless it said why; see `dmesg`"
        print_error(f"\nerror: {names} is gone: {why}")
        with quiet(), suppress(dist.DistError):
            heart[0].speaks_first()
            heart[0].tell_others([*gone], "")
    elif not gone:
        reason = str(error).partition("\n")[0].partition(". This is")[0]
        try:
            with quiet():
                if not heart[0].speaks_first():
                    heart[0].wait_until_told()
                    sys.exit(1)
                lost, named = heart[0].missing()
            text = named or "a process of another machine is gone, see what it printed"
            print_error(f"\nerror: {text} ({reason})")
            heart[0].tell_others(lost, named)
        except dist.DistError:  # the machine of rank 0 is gone, and with it the store: nobody knows who speaks
            if rank() == min(neighbours):
                print_error(f"\nerror: {heart[0].store_is_gone()} ({reason})")
    sys.exit(1)


def _end_if_stuck(error: Exception) -> NoReturn:
    """Ends the process with code 1: it has waited for others that are alive, until the time for it was over."""
    if _speaks_first():
        _close_bars()
        where = heart[0].standing()
        reason = str(error).partition("\n")[0].partition(". This is")[0]
        print_error(f"\nerror: waited in vain for other processes, though all are alive: {where} ({reason})")
    sys.exit(1)


def _end_of_process(number: int) -> str | None:
    """How a process of this machine ended: "" if by itself, with an error; None if it is alive."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "its process has ended"
    if fields[0] not in "ZX":
        return None
    code = int(fields[-1])
    return f"killed by {signal.Signals(code & 127).name}" if code & 127 else ""


def out_of_memory(error: BaseException) -> str | None:
    """The message if this is PyTorch's or Python's out-of-memory error; None if it is not."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    if not known:
        return None
    asked = re.search(r"allocate ([\d.]+) (bytes|[KMG]iB)", str(error))
    units = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    return "out of memory" + (
        f", asked for another {float(asked[1]) * units[asked[2]] / 2**20:.4g} MiB" if asked else ""
    )


def _someone_erred() -> bool:
    if not heart:
        return False
    try:
        with quiet():
            return heart[0].someone_erred()
    except dist.DistError:
        return False
