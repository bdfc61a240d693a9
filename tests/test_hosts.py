"""tools/cluster_check.py: its hosts, network namespaces that are killed, cut off and frozen like machines, and a run that
loses one of two and gets it back."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"

# Host 2 sends a line each 0.05 s to host 1, which writes what it gets, and how it ended.
PROGRAM = """
import json, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cluster_check_parts.hosts import Cluster, enter, namespaces, obstacle
if (why := obstacle()) is not None:
    sys.exit(f"no namespaces: {why}")
enter()
folder, found = Path(sys.argv[2]), {}
SEND = '''
import socket, time
peer = socket.create_connection(("host1", 5000))
while True:
    peer.send(b"a")
    time.sleep(0.05)
'''
TAKE = '''
import socket
server = socket.create_server(("", 5000))
while True:
    peer, _ = server.accept()
    print("connected", flush=True)
    try:
        while peer.recv(1):
            print("got", flush=True)
        print("ended", flush=True)
    except OSError:
        print("ended", flush=True)
'''
def said():
    return (folder / "log1").read_text().split()
def until(condition):
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.05)
    return False
def grows(seconds):
    before = len(said())
    time.sleep(seconds)
    return len(said()) > before
with Cluster(folder, 2, [Path(sys.prefix), Path(sys.base_prefix), folder]) as cluster:
    one, two = cluster.hosts
    two.run(["bash", "-c", "hostname; echo mine > /tmp/own; cat /tmp/own"], folder / "log2", {}).wait()
    one.run(["bash", "-c", "ls /tmp/own"], folder / "log3", {}).wait()
    found["own"] = (folder / "log2").read_text().split(), "No such file" in (folder / "log3").read_text()
    one.run([sys.executable, "-c", TAKE], folder / "log1", {})
    time.sleep(0.3)
    two.run([sys.executable, "-c", SEND], folder / "log2", {})
    until(lambda: "got" in said())
    for name in ("cut", "freeze"):
        getattr(two, name)()
        time.sleep(0.3)
        found[name] = grows(0.5), "ended" in said()
        getattr(two, name)(True)
        found[f"{name}, back"] = until(lambda: grows(0.2)), "ended" in said()
    two.kill()
    found["killed"] = until(lambda: "ended" in said())
    cluster.start(two)
    two.run([sys.executable, "-c", SEND], folder / "log2", {})
    found["again"] = until(lambda: said().count("connected") == 2)
(folder / "found.json").write_text(json.dumps(found))
"""


def test_hosts_are_killed_cut_off_and_frozen_like_machines(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    done = subprocess.run([sys.executable, file, TOOLS, tmp_path], capture_output=True, text=True, timeout=150)
    if "no namespaces: " in done.stderr:
        pytest.skip(f"{done.stderr.strip()}; the rest of it is tried by tests/test_faults.py, on one host")
    assert done.returncode == 0, done.stderr
    silent, back = [False, False], [True, False]  # something comes, the connection has ended
    assert json.loads((tmp_path / "found.json").read_text()) == {
        "own": [["host2", "mine"], True],
        "cut": silent,
        "cut, back": back,
        "freeze": silent,
        "freeze, back": back,
        "killed": True,
        "again": True,
    }


def test_a_difference_that_is_not_a_number_is_not_passed_over(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    from cluster_check_parts.compare import difference

    one = [{"step": step, "loss": 2.0} for step in (1, 2)]
    assert difference(one, [one[0], {"step": 2, "loss": 2.5}]) == 0.25
    assert difference(one, [one[0], {"step": 2, "loss": math.nan}]) == difference(one, one[:1]) == math.inf


LOSES_A_HOST = """
import json, random, sys
from argparse import Namespace
from pathlib import Path
tools, folder, model = map(Path, sys.argv[1:])
sys.path.insert(0, str(tools))
from cluster_check import ROOT, Check, Run, one_fault, rendezvous, until
from cluster_check_parts.hosts import INSIDE, Cluster, enter, os
enter()
print("namespaces:", os.environ[INSIDE])
Run.patience = 3
flags = "--train.epochs 1000 --train.batch-size 1 --data.context-length 512 --fsdp.precision fp32 --optim.schedule constant"
args = Namespace(folder=folder, model=model, recipe="recipes/full_fsdp.py", flags=flags)
needed = [ROOT, Path(sys.prefix), Path(sys.base_prefix), folder, model]
with Cluster(folder, 2, needed) as cluster, rendezvous(cluster):
    parts = ["--eval.no-enabled", "--checkpoint.every", 5, "--fsdp.strategy", "full-shard", "--fsdp.lost-seconds", 20]
    disturbed = Run(args, cluster, "disturbed", 1, *parts).all(cluster.hosts, again=True)
    until(lambda: disturbed.last_step() > 0 and disturbed.about()["world_size"] == 2, "the first step")
    undisturbed = Run(args, cluster, "undisturbed", 1, "--eval.no-enabled", "--train.accumulate", 2)
    undisturbed.start(cluster.hosts[1], 1)
    fault = one_fault(disturbed, Check(folder), random.Random(1), 1, "killed")
    losses = [line["loss"] for line in disturbed.lines()]
    until(lambda: len(undisturbed.lines()) >= len(losses), "as many steps")
    found = {"fault": fault, "losses": losses, "undisturbed": [line["loss"] for line in undisturbed.lines()]}
(folder / "found.json").write_text(json.dumps(found))
"""


def test_a_run_goes_on_without_a_host_that_is_lost_and_takes_it_back(tiny_folder, tmp_path):
    file, folder = tmp_path / "program.py", tmp_path / "cluster"
    file.write_text(LOSES_A_HOST)
    folder.mkdir()
    command = [sys.executable, file, TOOLS, folder, tiny_folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as program:
        try:
            said, _ = program.communicate(timeout=280)
        finally:
            program.terminate()
    print(said)  # "namespaces: yes", or why the hosts are only addresses of the loopback
    assert program.returncode == 0, said
    found = json.loads((folder / "found.json").read_text())
    fault, losses = found["fault"], found["losses"]
    assert fault["left"] == 1 and fault["names_it"] and fault["message"].startswith("error: "), found
    assert losses == pytest.approx(found["undisturbed"][: len(losses)], rel=1e-6)
    assert len(losses) > fault["at_step"]
