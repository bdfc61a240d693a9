"""What a rank asks and sends does not grow with the number of ranks."""

import threading

import torch.distributed as dist

from minillama.parallel.rendezvous import _agree


class CountingStore:
    """A store that notes the bytes of each request."""

    def __init__(self, store):
        self.store, self.sizes = store, []

    def __getattr__(self, name):
        def ask(*args):
            answer = getattr(self.store, name)(*args)
            sent = sum(len(str(text)) for arg in args for text in (arg if isinstance(arg, list) else [arg]))
            self.sizes.append(sent + (len(answer) if isinstance(answer, bytes) else 0))
            return answer

        return ask


def agreements(world_size, store):
    """(name, largest request in bytes) of each rank; ranks are threads."""
    stores = [CountingStore(store) for _ in range(world_size)]
    names = [""] * world_size

    def agree(rank):
        names[rank] = _agree(stores[rank], rank, world_size)

    threads = [threading.Thread(target=agree, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [(name, max(one.sizes)) for name, one in zip(names, stores, strict=True)]


def test_live_processes_agree_on_a_name_by_requests_of_one_size():
    store = dist.HashStore()
    (few, small), *_ = agreements(2, store)[1:]
    found = agreements(24, store)  # which finds the numbers of the two before
    assert len({name for name, _ in found}) == 1 and found[0][0] not in ("", few)
    assert {size for _, size in found[1:]} <= {small, small + 1}  # a rank of two digits
    third = agreements(24, store)
    assert third[0][0] not in ("", found[0][0]) and len({name for name, _ in third}) == 1
