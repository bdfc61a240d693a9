"""tools/cluster_check.py: its hosts, network namespaces that are killed, cut off and frozen like machines, and a run that
loses one of two and gets it back."""

import json
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


def test_a_run_goes_on_without_a_host_that_is_lost_and_takes_it_back(tiny_folder, tmp_path):
    command = [sys.executable, TOOLS / "cluster_check.py", "--model", tiny_folder, "--folder", tmp_path / "cluster"]
    command += ["--only", "faults", "--faults", "1", "--kinds", "killed", "--seed", "1", "--lost-seconds", "20"]
    flags = "--train.epochs 100000 --train.batch-size 1 --data.context-length 512 --fsdp.precision fp32"
    command += ["--flags", f"{flags} --optim.schedule constant"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tool:
        try:
            said, _ = tool.communicate(timeout=280)
        finally:
            tool.terminate()
    print(said)  # without namespaces the hosts are addresses of the loopback: it says so
    assert tool.returncode == 0, said
    found = json.loads((tmp_path / "cluster/cluster_check.json").read_text())
    [fault], [check] = found["faults"], found["checks"]
    assert check["passed"] and fault["left"] == 1 and fault["message"].startswith("error: "), found
