"""Processes that torchrun restarts must not meet those they replace.

torchrun --max-restarts starts all workers anew when one dies, and they find each other through the same store as before,
which still holds the addresses of the dead: some connect to these and fail (PyTorch #135712; 2.13 still does). The count
of restarts cannot tell the attempts apart, as only the machine whose worker died counts up.
"""

import hashlib
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL_SECONDS = 0.05


def fresh_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """(store, rank, world size) as the launcher gives them; if it may restart, a part of the store that no one has used."""
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and world_size > 1:
        store = dist.PrefixStore(_agree(store, rank, world_size), store)
    return store, rank, world_size


def _agree(store: dist.Store, rank: int, world_size: int) -> str:
    """A name that only the processes now alive know.

    Each makes up a number. Rank 0 publishes the list of those it finds, old ones perhaps, until each process confirms
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
