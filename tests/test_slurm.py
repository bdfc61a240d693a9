"""The sbatch scripts, really run: Slurm's commands are stand-ins, its nodes are two torchrun agents on loopback."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {name: ROOT / f"recipes/slurm/{name}.sbatch" for name in ("one_node", "many_nodes")}
BIN = Path(sys.executable).parent

# What the scripts call. srun starts the command once a node and gives the worst exit code; scancel reaches what srun
# started, and nothing below it, as Slurm does with cgroups.
COMMANDS = {
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for ((node = 0; node < SLURM_NNODES; node++)); do
            SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
            echo $! >> "$STATE/agents"
        done
        worst=0
        for agent in $(jobs -p); do
            wait "$agent" || worst=$?
        done
        exit $worst""",
    "scontrol": """
        echo "scontrol $*" >> "$STATE/asked"
        if [[ $1 == show ]]; then printf '127.0.0.%s\\n' 1 2; fi""",
    "scancel": """
        echo "scancel $*" >> "$STATE/asked"
        kill -"${1#--signal=}" $(cat "$STATE/agents")""",
    "squeue": """
        cat "$STATE/job" """,
}


@pytest.fixture
def sbatch(tmp_path):
    """sbatch(script, *flags, recipe=) -> the running batch shell, in a folder where Slurm's commands are stand-ins."""
    state = tmp_path / "slurm"
    state.mkdir()
    for name, body in COMMANDS.items():
        (state / name).write_text(f"#!/bin/bash\n{body}\n")
        (state / name).chmod(0o755)
    mark = str(uuid.uuid4())
    shells = []

    def start(name, *flags, recipe, job_state="RUNNING N/A", restarts=0):
        (state / "job").write_text(job_state + "\n")
        (state / "agents").unlink(missing_ok=True)
        (state / "asked").write_text("")
        env = {
            "PATH": os.pathsep.join([str(state), str(BIN), os.environ["PATH"]]),
            "STATE": state,
            "RECIPE": recipe,
            "SLURM_JOB_ID": job_id(),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": 2 if name == "many_nodes" else 1,
            "SLURM_GPUS_ON_NODE": 1,  # how many processes; they train on the CPU
            "SLURM_CPUS_PER_TASK": 1,
            "SLURM_RESTART_COUNT": restarts,
            "STARTED_BY": mark,
        }
        with (tmp_path / "log").open("a") as log:
            shell = subprocess.Popen(
                ["bash", SCRIPTS[name], *map(str, flags)],
                cwd=tmp_path,
                env=os.environ | {key: str(value) for key, value in env.items()},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        shells.append(shell)
        return shell

    start.log = tmp_path / "log"
    start.asked = lambda: (state / "asked").read_text().splitlines()
    start.left_over = lambda: processes_with(mark)
    yield start
    for shell in shells:
        shell.kill()
        shell.wait()
    for pid in processes_with(mark):
        os.kill(pid, signal.SIGKILL)


def job_id():
    """One whose port (20000 + its last four digits) is free."""
    for last in range(os.getpid() % 10000, 20000):
        with socket.socket() as attempt:
            try:
                attempt.bind(("127.0.0.1", 20000 + last % 10000))
            except OSError:
                continue
        return 70000 + last % 10000
    raise AssertionError("no port is free")


def processes_with(mark):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"STARTED_BY={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


def until(condition, shell, log):
    for _ in range(600):
        if condition():
            return
        assert shell.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_well_formed(name):
    done = subprocess.run([BIN / "shellcheck", SCRIPTS[name]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    lines = SCRIPTS[name].read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[: last + 1])  # sbatch reads no further than the first command
    options = dict(re.match(r"#SBATCH (--[\w-]+)=?(.*)", line).groups() for line in lines if line.startswith("#SBATCH"))
    assert options["--ntasks-per-node"] == "1" and options["--signal"] == "B:USR1@300" and "--requeue" in options
    assert options["--output"].count("%j") == 1 and options["--open-mode"] == "append"
    text = " ".join(line.rstrip("\\") for line in lines)
    assert ("--nnodes" in text) == (name == "many_nodes") != ("--standalone" in text)
    timeout = int(re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text)[1])
    assert 30 < timeout < 300  # torchrun's default, and what --signal leaves


def test_both_scripts_end_alike():
    endings = {script.read_text().partition("step=$!\n")[2] for script in SCRIPTS.values()}
    assert len(endings) == 1 and endings != {""}


def test_two_nodes_stop_at_a_signal_and_go_on(sbatch, tiny_folder, tmp_path):
    rows = [{"dialogue": f"A: hi {i}", "summary": f"They meet, {i}."} for i in range(40)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    flags = ["--model", tiny_folder, "--output-dir", out, "--data.path", tmp_path / "train.json", "--device", "cpu"]
    flags += ["--data.context-length", 200, "--eval.no-enabled", "--train.batch-size", 1, "--train.epochs", 1000]
    flags += ["--train.max-steps", 1000, "--checkpoint.every", 1000]
    recipe = ROOT / "recipes/lora_fsdp.py"

    def steps():
        file = out / "metrics.jsonl"
        return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []

    shell = sbatch("many_nodes", *flags, recipe=recipe)
    until(lambda: len(steps()) > 3, shell, sbatch.log)
    shell.send_signal(signal.SIGUSR1)
    assert shell.wait(60) == 1
    log = sbatch.log.read_text()
    job = re.search(r"job (\d+) goes back into the queue", log)[1]
    asked = ["scontrol show hostnames node[1-2]", f"scancel --signal=TERM {job}", f"scontrol requeue {job}"]
    assert sbatch.asked() == asked, log
    assert not sbatch.left_over()
    stopped = len(steps())
    assert 3 < stopped < 1000 and not (out / "adapter").exists(), log
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == [f"step-{stopped:08}"], log

    shell = sbatch("many_nodes", *flags, "--train.max-steps", stopped + 3, recipe=recipe, restarts=1)
    assert shell.wait(60) == 0, sbatch.log.read_text()
    assert sbatch.asked() == asked[:1]  # finished: not requeued
    assert not sbatch.left_over()
    assert (out / "adapter/adapter_model.safetensors").exists()
    assert json.loads((out / "run.json").read_text())["world_size"] == 2
    assert f"after step {stopped}\n" in sbatch.log.read_text()
    assert steps() == list(range(1, stopped + 4))


# A recipe that takes its time to save, for what the real one is too quick for.
SLOW = """
import os, signal, sys, time
def save(number, frame):
    print("saving", flush=True)
    time.sleep(float(sys.argv[-1]) * int(os.environ["RANK"]))
    print("saved", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
print("training", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize(("number", "job_state"), [("SIGUSR1", "RUNNING N/A"), ("SIGTERM", "COMPLETING N/A")])
def test_agents_wait_for_their_workers_and_restart_none(sbatch, tmp_path, number, job_state):
    (tmp_path / "slow.py").write_text(SLOW)
    shell = sbatch("many_nodes", "2", recipe=tmp_path / "slow.py", job_state=job_state)
    until(lambda: sbatch.log.read_text().count("training") == 2, shell, sbatch.log)
    shell.send_signal(getattr(signal, number))
    assert shell.wait(30) == 1
    log = sbatch.log.read_text()
    assert log.count("training") == log.count("saving") == log.count("saved") == 2, log
    requeued = any(line.startswith("scontrol requeue") for line in sbatch.asked())
    assert requeued == (job_state == "RUNNING N/A")  # else it was cancelled, or Slurm requeues it
    assert not sbatch.left_over()


@pytest.mark.parametrize("preempted", ["N/A", "2026-11-27T22:28:51"])
def test_a_preempted_job_is_requeued_though_only_its_agents_got_the_signal(sbatch, tmp_path, preempted):
    """As Slurm does by default in a grace time."""
    (tmp_path / "slow.py").write_text(SLOW)
    shell = sbatch("one_node", "1", recipe=tmp_path / "slow.py", job_state=f"RUNNING {preempted}")
    until(lambda: sbatch.log.read_text().count("training") == 1, shell, sbatch.log)
    os.kill(int((tmp_path / "slurm/agents").read_text()), signal.SIGTERM)
    assert shell.wait(30) == 1
    requeued = any(line.startswith("scontrol requeue") for line in sbatch.asked())
    assert requeued == (preempted != "N/A"), sbatch.log.read_text()


def test_a_run_that_fails_is_tried_again_but_not_requeued(sbatch, tmp_path):
    (tmp_path / "failing.py").write_text("import sys; print('training', flush=True); sys.exit(3)")
    shell = sbatch("one_node", recipe=tmp_path / "failing.py")
    assert shell.wait(60) == 1
    assert sbatch.log.read_text().count("training") == 3
    assert sbatch.asked() == []
    assert not sbatch.left_over()
