"""The process group, what only rank 0 does, and reductions over the ranks."""

import atexit
import ctypes
import gc
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from minillama.errors import UserError, disk_text
from minillama.parallel.failures import heart, neighbours, print_error, rank, user_errors
from minillama.parallel.heartbeat import Heartbeat
from minillama.parallel.rendezvous import fresh_store

T = TypeVar("T")
Device = Literal["auto", "cpu", "cuda"]
EACH_TO_EACH = 1024
"""Processes up to which gloo connects each with each, in each of its four or more groups: then all notice a death at once"""


def say(text: str) -> None:
    """Prints once, on rank 0."""
    if rank() == 0:
        print(text, flush=True)


def warn(text: str) -> None:
    """Prints a warning once, on rank 0, to stderr: a program's answers on stdout stay as they are."""
    if rank() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


@contextmanager
def quiet_but_on_rank_zero() -> Iterator[None]:
    """Other ranks print nothing: what all would say, for example about wrong flags, is said once."""
    with open(os.devnull, "w") as nowhere, ExitStack() as stack:
        if rank() != 0:
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


@contextmanager
def process_group(device: Device = "auto", timeout_minutes: float = 30.0, lost_seconds: float = 60.0) -> Iterator[str]:
    """Joins the processes that torchrun (or another launcher) started, or this one alone; yields "cuda" or "cpu".

    A UserError of one ends them all, as user_errors does. One that gives no sign of life for lost_seconds ends them all
    too; one that is alive has timeout_minutes to come to where the others wait for it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that PyTorch can use; try --device cpu")
    needed = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" in os.environ and (missing := [name for name in needed if name not in os.environ]):
        raise UserError(f"RANK is set but {', '.join(missing)} is not: start with torchrun, or unset RANK")
    if device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        wanted = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # so that rank 0 raises too
        count = torch.cuda.device_count()
        # Some launchers show each process only its own GPU.
        own = count == 1 and os.environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
        if wanted > count and not own:
            raise UserError(f"{wanted} processes on a machine with {count} GPUs: start one a GPU")
        torch.cuda.set_device(0 if own else local_rank)
    else:
        keep_freed_memory()
    backend = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}[device]
    if "RANK" in os.environ:
        timeout = timedelta(minutes=timeout_minutes)
        store, own_rank, world_size = fresh_store(timeout)
        if world_size > EACH_TO_EACH:  # two are connected when they first exchange something
            os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        _allow_open_files(8 * min(world_size, EACH_TO_EACH) + 1024)
        _meet(store, own_rank, world_size, lost_seconds)
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=world_size, timeout=timeout)
    else:  # no launcher, so no address either
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    finished = False
    try:
        with user_errors():
            yield device
        finished = True
    finally:
        if heart:
            heart[0].stop()
        # NCCL would wait for the other ranks, which may be waiting for this one. torchrun ends them when this one exits.
        if finished or device == "cpu":
            dist.destroy_process_group()
        if heart and not finished:
            heart[0].wait_for_readers()
        heart.clear()
        _groups.clear()
        # A sharded model holds its group, and gloo's threads with it, in reference cycles. A thread that drops its last
        # tensor while the interpreter is being torn down aborts the process: end the threads before that.
        atexit.unregister(gc.collect)  # once, however many groups there were
        atexit.register(gc.collect)


def _allow_open_files(number: int) -> None:
    """Raises this process's limit to that many, as far as the system lets it: it is often 1,024, and a connection is one."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _meet(store: dist.Store, own_rank: int, world_size: int, lost_seconds: float) -> None:
    """Learns the processes of this machine, and begins to give signs of life."""
    first = own_rank - int(os.environ["LOCAL_RANK"])
    store.set(f"minillama/process/{own_rank}", f"{os.getpid()} {platform.node()}")
    ranks = range(world_size)
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun sets it, other launchers may not
        ranks = range(first, first + local_world_size())
    found = [value.decode().partition(" ") for value in store.multi_get([f"minillama/process/{r}" for r in ranks])]
    neighbours.clear()
    neighbours.update({r: int(pid) for r, (pid, _, node) in zip(ranks, found, strict=True) if node == platform.node()})
    if world_size > 1:
        heart.append(Heartbeat(store, own_rank, world_size, lost_seconds, print_error))


def keep_freed_memory() -> None:
    """Lets glibc, where it is the allocator, keep what is freed for the tensors that come next.

    By default large blocks go back to the kernel, which clears each page when it is allocated again. That is a third of the
    time of a full fine-tuning step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, at its highest: larger blocks still go back, smaller ones do not
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def group_without_timeout() -> dist.ProcessGroup:
    """A group of all ranks without a timeout, for waits of unknown length. Every rank must call it."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def on_rank_zero(task: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs task on rank 0 while the others wait. If it raises there, every rank raises; an OSError becomes a UserError.

    Returns the task's result on every rank. Every rank must call it.
    """
    result, failure = None, None
    if dist.get_rank() == 0:
        try:
            result = task()
        except Exception as error:
            failure = error
    answer: list[Any] = [failure and _text(failure), result]
    dist.broadcast_object_list(answer, src=0, group=group)
    _raise(failure, answer[0])
    return answer[1]


def _text(error: Exception) -> str:
    """The message for the other ranks; "" if it is no user's mistake: then only the rank that failed prints it."""
    if isinstance(error, OSError):
        return disk_text(error) if error.errno else str(error)
    return str(error) if isinstance(error, UserError) else ""


def _raise(failure: Exception | None, problem: str | None) -> None:
    """Raises what failed: here, or on the rank whose problem it is, as _text returns it."""
    if failure is not None and not isinstance(failure, (OSError, UserError)):
        raise failure
    if problem == "":
        sys.exit(1)
    if problem is not None:
        raise UserError(problem)


def first_of_ranks(mine: T | None, group: dist.ProcessGroup | None = None) -> T | None:
    """On every rank, what the lowest rank has that has something; None if no rank has. Every rank must call it.

    A number is exchanged, and then one rank's object only, so the cost does not grow with the number of ranks.
    """
    nobody = dist.get_world_size()
    lowest = torch.tensor(nobody if mine is None else dist.get_rank())
    dist.all_reduce(lowest, dist.ReduceOp.MIN, group)
    if int(lowest) == nobody:
        return None
    answer: list[Any] = [mine]
    dist.broadcast_object_list(answer, src=int(lowest), group=group)
    return answer[0]


def texts_on_rank_zero(text: str, group: dist.ProcessGroup | None = None) -> list[str]:
    """On rank 0 the texts of all ranks, elsewhere nothing. Every rank must call it."""
    mine = text.encode()
    length = torch.tensor(len(mine))
    dist.all_reduce(length, dist.ReduceOp.MAX, group)
    padded = torch.frombuffer(bytearray(mine.ljust(int(length) + 1, b"\0")), dtype=torch.uint8)
    first = dist.get_rank() == 0
    texts = [torch.empty_like(padded) for _ in range(dist.get_world_size())] if first else None
    dist.gather(padded, texts, dst=0, group=group)
    return [bytes(found.tolist()).rstrip(b"\0").decode() for found in texts or ()]


_groups: dict[str, dist.ProcessGroup] = {}
"""Of on_each_node, made by its first call in the group `world`: all processes without a timeout, those of this machine"""


def on_each_node(task: Callable[[], T]) -> T:
    """Runs task on the first process of each machine while the others wait, however long it takes.

    Returns the result of this machine. If it raises on one, every rank raises, as in on_rank_zero.
    Every rank must call it.
    """
    first = dist.get_rank() - int(os.environ.get("LOCAL_RANK", "0"))
    machine = [*range(first, first + local_world_size())]
    # Where each process sees only its own GPU, LOCAL_RANK may be that of the GPU.
    if "LOCAL_WORLD_SIZE" not in os.environ and neighbours:
        machine = sorted(neighbours)
    result, failure = None, None
    if dist.get_rank() == machine[0]:
        try:
            result = task()
        except Exception as error:
            failure = error
    world = dist.group.WORLD
    assert world is not None
    if _groups.get("world") is not world:
        _groups.update(world=world, all=group_without_timeout())
        _groups["machine"] = dist.new_group(machine, backend="gloo", use_local_synchronization=True)
    _raise(failure, first_of_ranks(None if failure is None else _text(failure), _groups["all"]))
    answer: list[Any] = [result]
    dist.broadcast_object_list(answer, src=machine[0], group=_groups["machine"])
    return answer[0]


def all_reduce(
    values: list[float], op: Literal["sum", "max"] = "sum", device: torch.device | str = "cpu"
) -> list[float]:
    """Each of a few numbers summed (or maximised) over all ranks, exactly (fp64)."""
    numbers = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(numbers, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return numbers.tolist()


def local_world_size() -> int:
    """Processes of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or len(neighbours) or process_count())


def is_rank_zero() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def process_count() -> int:
    """Number of processes: 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1
