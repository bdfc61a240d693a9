"""What a rank asks and sends does not grow with the number of ranks."""

import json
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import run_script

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


PROGRAM = """
import os, sys
from minillama.parallel import processes
world_size = 8
processes.EACH_TO_EACH = int(sys.argv[1])
def main(rank):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": sys.argv[2]}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(world_size)}
    with processes.process_group("cpu"):
        assert processes.on_each_node(lambda: 5) == 5
        group = processes.group_without_timeout()
        assert processes.first_of_ranks(rank if rank > 2 else None, group) == 3
        assert processes.texts_on_rank_zero(str(rank), group) == ([*map(str, range(world_size))] if rank == 0 else [])
        if rank == world_size - 1:
            print(len(os.listdir("/proc/self/fd")))
children = []
for rank in range(world_size):
    if not (child := os.fork()):
        main(rank)
        sys.stdout.flush()
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def test_many_processes_are_not_connected_each_with_each():
    """Of 8 processes, with the limit at 8 and at 7: files that one has open, in groups that work."""
    with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as other:
        ports = [str(server.getsockname()[1]) for server in (one, other)]
    commands = [[sys.executable, "-c", PROGRAM, limit, port] for limit, port in zip("87", ports, strict=True)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    each_to_each, needed = (int(process.communicate(timeout=100)[0]) for process in running)
    assert [process.returncode for process in running] == [0, 0]
    assert needed + 8 < each_to_each >= 4 * 7


def test_the_limit_of_open_files_is_raised():
    program = """
import resource
from minillama.parallel.processes import _allow_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 2000))
for number in (200, 1000, 3000):
    _allow_open_files(number)
    print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["300", "2000", "1000", "2000", "2000", "2000"]


def test_a_run_exchanges_and_opens_no_more_where_there_are_more_ranks(tiny_folder, tmp_path):
    """Of 8 and of 512 ranks, sharded within machines: what rank 0 and a rank of another machine exchange and open."""
    tool, out = Path(__file__).parents[1] / "tools/measure/scale_counts.py", tmp_path / "counts.json"
    codes, text = run_script(tool, "--model", tiny_folder, "--ranks", 8, 512, "--json", out, log=tmp_path / "log")
    assert codes == [0], text
    (few, few_of_other), (many, many_of_other) = (of.values() for of in json.loads(out.read_text()).values())
    for phase in ("step", "evaluation"):
        assert few[phase] == many[phase] == few_of_other[phase] == many_of_other[phase]
        assert few[phase]["all-gather"][0] > 0
    for before, now in ((few, many), (few_of_other, many_of_other)):
        assert before.keys() == now.keys()
        for phase in ("save", "model"):
            for kind in now[phase].keys() - {"others in its process groups"}:
                assert now[phase][kind][0] <= before[phase][kind][0], (phase, kind)
        for phase in (
            "start-up",
            "resuming",
        ):  # one more each: is the folder the same on all machines, and the small files
            for kind in ("all-reduce", "broadcast of an object", "gather to rank 0"):
                assert now[phase][kind][0] <= before[phase][kind][0] + 1, (phase, kind)
    assert many_of_other["save"]["gather to rank 0"][1] <= few_of_other["save"]["gather to rank 0"][1]
    for kind in ("keys asked of the store", "gather to rank 0"):
        assert many_of_other["start-up"][kind] == few_of_other["start-up"][kind]
    assert [*many["heartbeat"].values()] == [*few["heartbeat"].values()] == [[2, 0]]  # the signs of rank 0 and the next
    assert "MODEL/config.json" not in text and "MODEL/tokenizer" not in text and "MODEL/model.safetensors" in text
