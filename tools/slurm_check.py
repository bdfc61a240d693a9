"""Runs the scripts of recipes/slurm on a real Slurm: its daemons on two hosts of one machine, which are disturbed.

    python tools/slurm_check.py --model DIR --folder /tmp/slurm

Needs Linux, root, Slurm and munge (`apt-get install slurmctld slurmd slurm-client munge`), whose daemons it starts. A host
is a network namespace behind a bridge (cluster_check_parts/hosts.py) with a slurmd of its own. Its GPUs are only counted:
the recipe trains on the CPU, one process a host. DIR: a small model.

One job of many_nodes.sbatch is stopped by hand, by its time limit and by preemption in three settings, loses a node that is
set down and one without power, is cancelled, and is submitted again to run to its end. Its losses must be those of a job
that nothing disturbs. Prints one row a check and writes them to FOLDER/slurm_check.json. Ends with code 1 if one fails.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cluster_check_parts.compare import TOLERANCE, difference, until
from cluster_check_parts.hosts import NETWORK, Cluster, Host, enter, obstacle

ROOT = Path(__file__).parents[1]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
CONFIG = """
ClusterName=check
SlurmctldHost=control({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=1
SlurmdTimeout=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{user_signal}SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
NodeName=host[1-{count}] NodeAddr={network}.[1-{count}] CPUs=8 Gres=gpu:8
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
FLAGS = (
    "--train.epochs 100000 --train.batch-size 1 --data.context-length 256 --fsdp.precision fp32 --optim.lr 1e-4 "
    "--optim.schedule constant --checkpoint.every 20 --eval.every 50 --device cpu"
)


class Slurm:
    """Its daemons: slurmctld and munged here, a slurmd on each host."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "HOME": "/tmp/home"}
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.configure()
        (folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-7]\n")
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        subprocess.run(["hostname", "control"], check=True)
        names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        paths = [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in names]
        daemons = ["munged", "--foreground", "--force", *paths], ["slurmctld", "-D"]
        self.daemons = [self._start(command) for command in daemons]
        for host in cluster.hosts:
            self.start(host)
        self.wait_for("idle")

    def _start(self, command: list[str]) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{command[0]}.log").open("ab") as log:
            process = subprocess.Popen(command, env=self.env, stdout=log, stderr=log)
        if command[0] == "munged":
            until((self.folder / "munge.socket").exists, "munged", 30)
        return process

    def configure(self, user_signal: bool = True, grace: int = 120) -> None:
        """Of a preempted job. user_signal: it gets the signal it asked for; otherwise its steps get SIGTERM, as by default.
        grace: seconds until it is ended and requeued."""
        text = CONFIG.format(
            address=self.cluster.address,
            network=NETWORK,
            folder=self.folder,
            count=len(self.cluster.hosts),
            grace=grace,
            user_signal="" if user_signal else "#",
        )
        (self.folder / "slurm.conf").write_text(text)

    def start(self, host: Host) -> None:
        (self.folder / f"spool-{host.name}").mkdir(exist_ok=True)
        env = {"SLURM_CONF": self.env["SLURM_CONF"]}
        host.run(["slurmd", "-D", "-N", host.name], self.folder / f"slurmd-{host.name}.log", env)

    def ask(self, *command: Any) -> str:
        done = subprocess.run(list(map(str, command)), env=self.env, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join(map(str, command))}: {done.stderr.strip()}")
        return done.stdout.strip()

    def wait_for(self, state: str) -> None:
        """Until all nodes are in it."""

        def reached() -> bool:
            done = subprocess.run(["sinfo", "-hN", "-plow", "-o%t"], env=self.env, capture_output=True, text=True)
            return done.stdout.split() == [state] * len(self.cluster.hosts)

        until(reached, f"nodes that are {state}", 60)

    def stop(self) -> None:
        for daemon in self.daemons:
            daemon.kill()


class Job:
    """One of the scripts, submitted as it is."""

    def __init__(self, slurm: Slurm, args: argparse.Namespace, script: str, out: str, gpus: int, *flags: Any) -> None:
        self.slurm, self.out, self.log = slurm, slurm.folder / out, slurm.folder / f"{out}.log"
        options = [f"--gpus-per-node={gpus}", f"--cpus-per-task={gpus}", f"--output={self.log}"]
        if script == "many_nodes":
            options.append(f"--nodes={len(slurm.cluster.hosts)}")
        recipe = [f"--model={args.model}", f"--output-dir={self.out}", *shlex.split(args.flags), *flags]
        env = slurm.env | {"RECIPE": str(args.recipe)}
        command = ["sbatch", "--parsable", *options, f"recipes/slurm/{script}.sbatch", *map(str, recipe)]
        self.number = subprocess.run(
            command, cwd=ROOT, env=env, check=True, capture_output=True, text=True
        ).stdout.strip()

    def shown(self, name: str) -> str:
        """A field of `scontrol show job`."""
        found = re.search(rf"\b{name}=(\S+)", self.slurm.ask("scontrol", "show", "job", self.number))
        assert found, name
        return found[1]

    def restarts(self) -> int:
        return int(self.shown("Restarts"))

    def lines(self) -> list[dict[str, Any]]:
        file = self.out / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def last_step(self) -> int:
        return max((line["step"] for line in self.lines() if "loss" in line), default=0)

    def resumed_at(self) -> int:
        """The step after which the newest start goes on; -1 before there is one."""
        file = self.out / "run.json"
        about = json.loads(file.read_text()) if file.exists() else {}
        folder = about.get("resumed_from")
        return int(Path(folder).name.removeprefix("step-")) if folder else -1

    def end(self) -> str:
        """Waits for it; returns the state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        until(lambda: self.shown("JobState") in ended, f"the end of job {self.number}", 600)
        self.slurm.wait_for("idle")
        return self.shown("JobState")

    def ended_well(self) -> bool:
        return self.end() == "COMPLETED" and ((self.out / "model").exists() or (self.out / "adapter").exists())


class Check:
    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, list[dict[str, Any]]()

    def add(self, what: str, passed: bool, detail: str) -> None:
        print(f"{'passed' if passed else 'FAILED':7} {what}: {detail}", flush=True)
        self.rows.append({"check": what, "passed": passed, "detail": detail})
        (self.folder / "slurm_check.json").write_text(json.dumps(self.rows, indent=1) + "\n")


def disturb(job: Job, check: Check, what: str, cause: Callable[[], object], lost: bool = False) -> None:
    """Disturbs a job while it trains, and waits until it trains again. lost: it may have had no time to save."""
    begun = job.last_step() + 5
    until(lambda: job.last_step() >= begun, f"step {begun}")
    restarts = job.restarts()
    disturbed = time.monotonic()
    cause()
    until(lambda: job.restarts() > restarts or job.shown("JobState") == "FAILED", f"a requeue: {what}")
    if job.shown("JobState") == "FAILED":
        check.add(what, False, f"job {job.number} has failed, see {job.log}")
        raise SystemExit(1)
    requeued = time.monotonic() - disturbed
    before = (job.out / "run.json").read_text()
    until(lambda: job.shown("JobState") == "RUNNING", "a start")
    last = job.last_step()
    until(lambda: (job.out / "run.json").read_text() != before, "a start")
    resumed = job.resumed_at()
    back = until(lambda: job.last_step() > resumed, "the next step") - disturbed
    passed = resumed == last or (lost and last - 20 <= resumed <= last)
    detail = f"requeued after {requeued:.0f} s, next step after {back:.0f} s, steps lost: {last - resumed}"
    check.add(what, passed, detail)


def checks(args: argparse.Namespace, slurm: Slurm, check: Check) -> None:
    *_, host = slurm.cluster.hosts
    job = Job(slurm, args, "many_nodes", "disturbed", 1)
    number = job.number
    until(lambda: job.last_step() > 0, "the first step")
    disturb(job, check, "USR1 by hand", lambda: slurm.ask("scancel", "--batch", "--signal=USR1", number))

    def shorten() -> None:
        restarts = job.restarts()
        slurm.ask("scontrol", "update", f"JobId={number}", "TimeLimit=5")  # the signal comes 5 minutes before
        until(lambda: job.restarts() > restarts, "a requeue")
        slurm.ask("scontrol", "update", f"JobId={number}", "TimeLimit=60")

    disturb(job, check, "the time limit", shorten)

    def preempt() -> None:
        options = ["--partition=high", f"--nodes={len(slurm.cluster.hosts)}", "--exclusive", "--output=/dev/null"]
        slurm.ask("sbatch", *options, "--wrap=sleep 5")

    disturb(job, check, "preempted, with the signal it asked for", preempt)
    for grace in (120, 0):
        slurm.configure(user_signal=False, grace=grace)
        slurm.ask("scontrol", "reconfigure")
        disturb(job, check, f"preempted, with Slurm's default signal and a grace time of {grace} s", preempt)

    def set_down() -> None:
        slurm.ask("scontrol", "update", f"NodeName={host.name}", "State=DOWN", "Reason=check")
        time.sleep(5)
        slurm.ask("scontrol", "update", f"NodeName={host.name}", "State=RESUME")

    disturb(job, check, "a node is set down", set_down, lost=True)

    def power_off() -> None:
        restarts = job.restarts()
        host.kill()
        until(lambda: job.restarts() > restarts, "a requeue")
        slurm.cluster.start(host)
        slurm.start(host)

    disturb(job, check, "a node without power", power_off, lost=True)
    until(lambda: job.last_step() % 20 == 10, "a step between two checkpoints")
    slurm.ask("scancel", number)
    state = job.end()
    saved = max(int(path.name.removeprefix("step-")) for path in (job.out / "checkpoints").glob("step-????????"))
    what = f"{state}, last step {job.last_step()}, last checkpoint {saved}"
    check.add("scancel", state == "CANCELLED" and saved == job.last_step(), what)
    steps = job.last_step() + 20
    rest = Job(slurm, args, "many_nodes", "disturbed", 1, "--train.max-steps", steps)
    check.add("submitted again", rest.ended_well(), f"to its end, {steps} steps")
    for script, gpus in (("many_nodes", 1), ("one_node", len(slurm.cluster.hosts))):
        other = Job(slurm, args, script, f"undisturbed-{script}", gpus, "--train.max-steps", steps)
        ended = other.ended_well()
        differs = difference(other.lines(), rest.lines())
        what = f"{len(rest.lines())} losses, largest relative difference to the disturbed job's {differs:.1e}"
        check.add(f"{script}, undisturbed", ended and differs < TOLERANCE, what)
    failing = Job(slurm, args, "one_node", "failing", 1, "--data.path", "nowhere")
    state = failing.end()
    check.add("a job that fails by itself", state == "FAILED" and failing.shown("Restarts") == "0", state)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a small model")
    parser.add_argument("--folder", type=Path, required=True, help="a new folder, for what the jobs leave")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/full_fsdp.py"))
    parser.add_argument("--flags", default=FLAGS, help="of the recipe")
    args = parser.parse_args()
    args.folder, args.model = args.folder.resolve(), args.model.resolve()
    problem = None
    if not args.model.is_dir():
        problem = f"--model {args.model}: no such folder; give that of a small model"
    elif args.folder.exists() and any(args.folder.iterdir()):
        problem = f"--folder {args.folder} holds other files: give a new one"
    elif missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        problem = f"{', '.join(missing)} not found: install Slurm and munge (slurmctld, slurmd, slurm-client, munge)"
    elif os.geteuid() != 0:
        problem = "slurmd starts jobs for other users: run this as root, in a container for instance"
    elif why := obstacle():
        problem = f"no namespaces here: {why}"
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    enter()
    args.folder.mkdir(parents=True, exist_ok=True)
    check = Check(args.folder)
    needed = [ROOT, Path(sys.prefix), Path(sys.base_prefix), args.folder, args.model]
    with Cluster(args.folder, 2, needed) as cluster:
        slurm = Slurm(args.folder, cluster)
        try:
            checks(args, slurm, check)
        finally:
            slurm.stop()
    return int(not all(row["passed"] for row in check.rows))


if __name__ == "__main__":
    sys.exit(main())
