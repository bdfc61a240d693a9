"""Processes that torchrun restarts must not meet those they replace.

torchrun --max-restarts restarts all workers when one dies. They find each other through the same store as before, which
still holds the addresses of the dead workers: some connect to these and fail (PyTorch #135712; 2.13 still does). The count
of restarts cannot tell the attempts apart: only the machine whose worker died increments it.
"""

import hashlib
import os
import sys
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from minillama.parallel.failures import print_error

POLL_SECONDS = 0.05


def fresh_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """(store, rank, world size) as the launcher gives them. If it may restart: with an unused prefix of the store."""
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and world_size > 1:
        store = dist.PrefixStore(_agree(store, rank, world_size, timeout), store)
    return store, rank, world_size


def _agree(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that only the live processes know. Ends the process if they are not all there within the timeout.

    Each draws a number. Rank 0 makes a name of those it finds, perhaps old ones, and leaves it for each under its number.
    Only a live process finds it there, and confirms it. Rank 0 alone handles the numbers of all: the others make the same
    few requests, of the same size, however many there are.
    """
    own, confirmed = uuid.uuid4().hex, ""
    store.set(f"minillama/number/{rank}", own)
    numbers: list[str] = []
    keys = [f"minillama/number/{r}" for r in range(world_size)]
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if rank == 0 and store.check(keys):
            found = [number.decode() for number in store.multi_get(keys)]
            if found[0] != own:  # another process has taken the place of this one, which was frozen
                sys.exit(1)
            name = hashlib.sha256(" ".join(found).encode()).hexdigest()
            if found != numbers:
                numbers = found
                store.multi_set([f"minillama/name/{number}" for number in numbers], [name] * world_size)  # type: ignore[attr-defined]
            if store.check([f"minillama/confirmed/{name}/{number}" for number in numbers[1:]]):
                store.set(f"minillama/agreed/{name}", "yes")
                return name
        elif rank != 0 and store.check([f"minillama/name/{own}"]):
            name = store.get(f"minillama/name/{own}").decode()
            if name != confirmed:
                store.set(f"minillama/confirmed/{name}/{own}", "yes")
                confirmed = name
            if store.check([f"minillama/agreed/{name}"]):
                return name
        time.sleep(POLL_SECONDS)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print_error(
            f"error: rank {rank} has waited {timeout} for all {world_size} processes to start: see what the others "
            "printed, and whether all machines are there"
        )
    sys.exit(1)
