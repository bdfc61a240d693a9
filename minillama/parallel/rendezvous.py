"""Processes that torchrun restarts must not meet those they replace.

torchrun --max-restarts restarts all workers when one dies. They find each other through the same store as before, which
still holds the addresses of the dead workers: some connect to these and fail (PyTorch #135712; 2.13 still does). The count
of restarts cannot tell the attempts apart: only the machine whose worker died increments it.
"""

import hashlib
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL_SECONDS = 0.05


def fresh_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """(store, rank, world size) as the launcher gives them. If it may restart: with an unused prefix of the store."""
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and world_size > 1:
        store = dist.PrefixStore(_agree(store, rank, world_size), store)
    return store, rank, world_size


def _agree(store: dist.Store, rank: int, world_size: int) -> str:
    """A name that only the live processes know.

    Each draws a number. Rank 0 publishes the list of the numbers it finds, perhaps old ones, until each process confirms
    that its own is in the list.
    """
    own = uuid.uuid4().hex
    store.set(f"minillama/number/{rank}", own)
    while True:
        if rank == 0:
            numbers = [store.get(f"minillama/number/{r}").decode() for r in range(world_size)]
            store.set("minillama/numbers", " ".join(numbers))
        listed = store.get("minillama/numbers").decode()
        name = hashlib.sha256(listed.encode()).hexdigest()
        if listed.split()[rank : rank + 1] == [own]:
            store.set(f"minillama/confirmed/{rank}", listed)
            if rank == 0 and all(_confirmed(store, r) == listed for r in range(world_size)):
                store.set(f"minillama/agreed/{name}", "yes")
            if store.check([f"minillama/agreed/{name}"]):
                return name
        time.sleep(POLL_SECONDS)


def _confirmed(store: dist.Store, rank: int) -> str | None:
    key = f"minillama/confirmed/{rank}"
    return store.get(key).decode() if store.check([key]) else None
