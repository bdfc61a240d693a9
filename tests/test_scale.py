"""What a rank asks and sends does not grow with the number of ranks."""

import json
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import run_script

from minillama.formats.hf import READERS
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
        names[rank] = _agree(stores[rank], rank, world_size, timedelta(seconds=60))

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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_does_not_wait_for_ever_for_others_to_start(rank, capfd):
    with pytest.raises(SystemExit):
        _agree(dist.HashStore(), rank, 2, timedelta(seconds=0.2))
    assert f"rank {rank} has waited 0:00:00.200000 for all 2 processes to start" in capfd.readouterr().err


def test_a_rank_zero_that_was_replaced_does_not_agree():
    store, ended = dist.HashStore(), threading.Event()

    def frozen():
        with pytest.raises(SystemExit):
            _agree(store, 0, 2, timedelta(seconds=60))
        ended.set()

    threading.Thread(target=frozen, daemon=True).start()
    store.get("minillama/number/0")
    for rank in (0, 1):
        store.set(f"minillama/number/{rank}", "of a new process")
    assert ended.wait(10)


def test_a_run_exchanges_and_opens_no_more_where_there_are_more_ranks(tiny_folder, tmp_path):
    """Of 8 and of 512 ranks, sharded within machines: rank 0's collectives, groups and files, which a tool counts."""
    tool = Path(__file__).parents[1] / "tools/measure/scale_counts.py"
    flags = [
        "--model",
        tiny_folder,
        "--ranks",
        8,
        512,
        "--strategy",
        "hybrid-shard",
        "--json",
        tmp_path / "counts.json",
    ]
    codes, text = run_script(tool, *flags, log=tmp_path / "log")
    assert codes == [0], text
    counts = json.loads((tmp_path / "counts.json").read_text())
    few, many = counts["8"], counts["512"]

    for start in ("first", "resumed"):
        assert few[start].keys() == many[start].keys()
        for phase, kinds in many[start].items():
            for kind, (number, size) in kinds.items():
                where, (before, smaller) = f"{start}, {phase}: {kind}", few[start][phase][kind]
                # At the start: whether all machines have the same output folder. Each thread that loads opens the weights.
                more = (phase == "start-up") + READERS * (kind == "files read")
                assert before - more <= number <= before + more, where
                # A number a launch at the start, a line a file of the checkpoint that it resumes from, and in its index.
                grows = phase in ("start-up", "saving") and kind in ("all-reduce", "broadcast", "files read")
                # Which rank writes what all have, and plans for it, is PyTorch's choice.
                assert "PyTorch" in kind or size <= 1.1 * smaller + 512 * 256 * grows, where
    assert many["first"].keys() == {"start-up", "evaluation", "step", "saving"}
    assert many["first"]["step"]["all-gather"][0] > 0 and many["first"]["saving"]["files written"][0] > 0
    assert all("objects of all ranks to all ranks" not in kinds for kinds in many["first"].values())
