"""Trains on several hosts of one machine, takes them away and gives them back, and compares with an undisturbed run.

    python tools/cluster_check.py --model DIR --folder /tmp/cluster                       everything, with 20 random faults
    python tools/cluster_check.py --model DIR --folder /tmp/cluster --only train          no faults
    python tools/cluster_check.py --model DIR --folder /tmp/cluster --only faults --faults 5 --seed 3 --hosts 3

A host is a network namespace behind a bridge, with its own hostname, processes, /tmp and cache; torchrun runs on each,
gloo between them. Only the output folder is shared. Where namespaces are not allowed, a host is an address of the
loopback. DIR: a small model. A fault takes one host at a random moment of a step: killed (all its processes at once), cut
(its link goes down, without a FIN), frozen (SIGSTOP to all its processes). torchrun --nnodes goes on with the hosts that
are left, and takes it back when it returns. A slow disk (strace delays each fsync of one host) is no fault.

Prints one row a check and a fault, and writes them to FOLDER/cluster_check.json. Ends with code 1 if anything differs.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cluster_check_parts.compare import TOLERANCE, difference, until
from cluster_check_parts.hosts import INSIDE, Cluster, Host, enter, namespaces

ROOT = Path(__file__).parents[1]
TORCHRUN = Path(sys.executable).parent / "torchrun"
KINDS = ("killed", "cut", "frozen")
STORE = """
import sys, time
import torch.distributed as dist
store = dist.TCPStore(sys.argv[1], 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(1e9)
"""


class Run:
    """One run of a recipe on the hosts of a cluster, with a torchrun on each that is started again when it fails."""

    patience = 5
    """Seconds without a sign after which an agent is dead, and for which the others wait for more agents"""

    def __init__(self, args: argparse.Namespace, cluster: Cluster, name: str, processes: int, *flags: Any) -> None:
        self.args, self.cluster, self.name, self.processes = args, cluster, name, processes
        self.out = args.folder / name / "out"
        self.flags = [f"--model={args.model}", f"--output-dir={self.out}", "--device=cpu", *shlex.split(args.flags)]
        self.flags += map(str, flags)
        self.agents: dict[int, subprocess.Popen[bytes]] = {}
        (args.folder / name).mkdir(parents=True, exist_ok=True)

    def log(self, host: Host) -> Path:
        return self.args.folder / self.name / f"{host.name}.log"

    def start(self, host: Host, hosts: int = 0, again: bool = True, under: Sequence[str] = ()) -> None:
        """Starts torchrun on a host, under another program if one is given.

        hosts: how many there are to be, by default all, or as many as are left.
        """
        count = len(self.cluster.hosts)
        conf = (
            f"is_host=0,keep_alive_interval=1,keep_alive_max_attempt={self.patience},last_call_timeout={self.patience}"
        )
        command = [
            *(
                *under,
                TORCHRUN,
                "--nnodes",
                hosts or f"1:{count}",
                "--nproc-per-node",
                self.processes,
                "--max-restarts",
                1000 if again else 0,
            ),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.cluster.address}:{self.cluster.port}"),
            *("--rdzv-id", self.name, "--rdzv-conf", conf, "--local-addr", host.address),
            *(ROOT / self.args.recipe, *self.flags),
        ]
        text = shlex.join(map(str, command))
        env = {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": self.cluster.interface,
            # PyTorch 2.13: an agent that was of the first machine keeps offering its old store, when that machine is another
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        loop = f"until {text}; do echo torchrun ends: $?; sleep 1; done" if again else text
        self.agents[host.number] = host.run(["bash", "-c", loop], self.log(host), env)

    def lines(self) -> list[dict[str, Any]]:
        file = self.out / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def last_step(self) -> int:
        return max((line["step"] for line in self.lines() if "loss" in line), default=0)

    def about(self) -> dict[str, Any]:
        file = self.out / "run.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def said(self) -> str:
        return "".join(
            self.log(host).read_text(errors="replace") for host in self.cluster.hosts if self.log(host).exists()
        )

    def finished(self) -> bool:
        return (self.out / "model").exists() or (self.out / "adapter").exists()

    def wait(self, seconds: float = 900) -> None:
        """Until torchrun has ended on each host."""

        def ended() -> bool:
            codes = {agent.poll() for agent in self.agents.values()}
            return 0 in codes or None not in codes

        until(ended, "the end of " + self.name, seconds)
        deadline = time.monotonic() + 15
        while any(agent.poll() is None for agent in self.agents.values()) and time.monotonic() < deadline:
            time.sleep(0.1)

    def all(self, hosts: list[Host], again: bool = False) -> "Run":
        for host in hosts:
            self.start(host, 0 if again else len(hosts), again)
        return self

    def errors(self) -> list[str]:
        return [line for line in self.said().splitlines() if line.startswith("error: ")]


@contextmanager
def rendezvous(cluster: Cluster) -> Iterator[None]:
    """A store on none of the hosts, where their agents find each other."""
    command = [sys.executable, "-c", STORE, cluster.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as store:
        try:
            assert store.stdout
            cluster.port = int(store.stdout.readline())
            yield
        finally:
            store.kill()


class Check:
    def __init__(self, folder: Path) -> None:
        self.folder, self.rows, self.faults = folder, list[dict[str, Any]](), list[dict[str, Any]]()

    def add(self, what: str, passed: bool, detail: str) -> None:
        print(f"{'passed' if passed else 'FAILED':7} {what}: {detail}", flush=True)
        self.rows.append({"check": what, "passed": passed, "detail": detail})
        self.write()

    def write(self) -> None:
        machine = {"hostname": socket.gethostname(), "namespaces": os.environ[INSIDE]}
        content = {"machine": machine, "checks": self.rows, "faults": self.faults}
        (self.folder / "cluster_check.json").write_text(json.dumps(content, indent=1) + "\n")


def check_training(args: argparse.Namespace, cluster: Cluster, check: Check) -> None:
    """What several hosts train is what one trains, however the model is sharded."""
    first, *_ = hosts = cluster.hosts
    steps = ["--train.max-steps", args.steps, "--eval.every", 10, "--checkpoint.every", 10]
    whole = 2 * len(hosts)
    one = Run(args, cluster, "one", 1, *steps, "--train.accumulate", whole)
    one.all([first]).wait()
    losses = [line["loss"] for line in one.lines() if "loss" in line]
    check.add("one host trains", len(losses) == args.steps, f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    for strategy in ("hybrid-shard", "full-shard"):
        run = Run(args, cluster, strategy, 2, *steps, "--train.accumulate", 1, "--fsdp.strategy", strategy)
        slices = namespaces() and strategy == "full-shard"
        if slices:
            own_weights(args.model, hosts, run.processes)
            run.flags.append("--model=/tmp/model")
        run.all(hosts).wait()
        differs = difference(one.lines(), run.lines())
        about = run.about()
        check.add(
            f"{len(hosts)} hosts x 2 processes, {strategy}",
            differs < TOLERANCE and about.get("world_size") == whole and run.finished(),
            f"{len(run.lines())} losses, largest relative difference to one host {differs:.1e}",
        )
        if slices:
            check.add(
                "each host reads only its own rows of the weights",
                run.finished(),
                "; ".join(run.errors()) or "the others' rows are NaN in its copy of the file",
            )
        elif strategy == "hybrid-shard":
            copies = f"hybrid-shard of {run.processes}" in run.said()
            check.add("hybrid-shard: a copy of the model on each host", copies, f"each of {run.processes} processes")
        writers = {file.name for file in (run.out / "checkpoints").glob("step-*/__*.distcp")}
        check.add(
            f"{strategy}: all processes write the checkpoint", len(writers) == whole, f"{len(writers)} files of it"
        )
    if namespaces():
        built = [
            len([*(args.folder / host.name / "tmp/home/cache/minillama").glob("????????*/about.json")])
            for host in hosts
        ]
        check.add(
            "data is tokenized once a host",
            set(built) == {2},
            f"{built} data sets, of training and validation, in the hosts' own caches",
        )
        alone = Run(args, cluster, "not_shared", 1, *steps, "--output-dir", "/tmp/out")
        alone.all(hosts)
        until(lambda: all(agent.poll() is not None for agent in alone.agents.values()), "the end of not_shared", 300)
        said = alone.errors()
        named = len(said) == 1 and "is not the same folder" in said[0]
        check.add("an output folder that is not shared", named, "; ".join(said) or "no message")

    if why := no_slow_disk():
        print(f"skipped a slow disk on one host: {why}")
        return
    seconds = 5
    lost = ["--fsdp.strategy", "full-shard", "--fsdp.lost-seconds", seconds]
    slow = Run(args, cluster, "slow_disk", 1, *steps, "--train.accumulate", 2, *lost)
    trace = args.folder / "slow_disk/fsync.txt"
    delay = f"inject=fsync:delay_enter={2 * seconds * 1_000_000}"
    for host in hosts:
        under = ["strace", "-f", "-o", trace, "-e", "trace=fsync", "-e", delay] if host is hosts[-1] else []
        slow.start(host, len(hosts), again=False, under=under)
    slow.wait()
    differs, delayed = difference(one.lines(), slow.lines()), trace.read_text().count("DELAYED")
    check.add(
        "a slow disk on one host is not a fault",
        differs < TOLERANCE and delayed > 0 and not slow.errors() and slow.finished(),
        "; ".join(slow.errors())
        or f"{delayed} fsyncs there took {2 * seconds} s (strace), --fsdp.lost-seconds {seconds}; difference {differs:.1e}",
    )


def own_weights(model: Path, hosts: list[Host], processes: int) -> None:
    """Gives each host a copy of the model at its own /tmp/model, with NaN for the rows that processes of others hold."""
    from safetensors.torch import load_file, save_file  # seconds, which only this needs

    for place, host in enumerate(hosts):
        folder = host.folder / host.name / "tmp/model"
        folder.mkdir()
        for file in model.iterdir():
            shutil.copyfile(file, folder / file.name)
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            for tensor in tensors.values():
                for rank, rows in enumerate(tensor.chunk(len(hosts) * processes)):
                    if rank // processes != place:
                        rows.fill_(float("nan"))
            save_file(tensors, file, {"format": "pt"})


def no_slow_disk() -> str | None:
    """Why the disk of a process cannot be made slow; None if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-f", "-e", "trace=fsync", "true"], capture_output=True, text=True)
    return None if tried.returncode == 0 else tried.stderr.strip().splitlines()[-1]


def one_fault(run: Run, check: Check, chance: random.Random, number: int, kind: str) -> dict[str, Any]:
    """Takes a host from a run, waits until the others go on, gives it back, and waits until it trains with them."""
    cluster, hosts = run.cluster, run.cluster.hosts
    host = chance.choice(hosts)
    left = [other for other in hosts if other is not host]
    begun = run.last_step() + chance.randint(2, 6)
    until(lambda: run.last_step() >= begun, f"step {begun}")
    time.sleep(chance.uniform(0, 0.3))
    said = {other.number: run.log(other).stat().st_size for other in left}

    def error() -> str:
        for other in left:
            with run.log(other).open(errors="replace") as file:
                file.seek(said[other.number])
                if found := [line for line in file.read().splitlines(keepends=True) if line.startswith("error: ")]:
                    return found[0].strip()
        return ""

    started = run.about()["started"], run.about()["world_size"]
    step = run.last_step()
    fault = time.monotonic()
    {"killed": host.kill, "cut": host.cut, "frozen": host.freeze}[kind]()
    detected = until(error, f"a message about {host.name}, {kind}") - fault
    until(lambda: (run.about()["started"], run.about()["world_size"]) != started, "a new start")
    about = run.about()
    resumed = int(Path(about["resumed_from"] or "step-0").name.removeprefix("step-"))
    back = until(lambda: run.last_step() > resumed, "the next step") - fault
    smaller = about["world_size"]
    returns = time.monotonic()
    if kind == "killed":
        cluster.start(host)
        run.start(host)
    else:
        {"cut": host.cut, "frozen": host.freeze}[kind](True)
    whole = len(hosts) * run.processes
    until(lambda: run.about()["world_size"] == whole or run.finished(), f"the return of {host.name}")
    resumed_again = int(Path(run.about()["resumed_from"] or "step-0").name.removeprefix("step-"))
    returned = until(lambda: run.last_step() > resumed_again, "the next step with all") - returns
    lost = error().lower().partition("last seen")[0]
    row = {
        "fault": number,
        "kind": kind,
        "host": host.number,
        "at_step": step,
        "detected_after_s": round(detected, 1),
        "next_step_after_s": round(back, 1),
        "steps_lost": step - resumed,
        "left": smaller,
        "returned_after_s": round(returned, 1),
        "message": error(),
        "names_it": not namespaces() or any(name in lost for name in (host.name, host.address)),
    }
    check.faults.append(row)
    check.write()
    print(" ".join(f"{str(value)[:150]:>6}" for value in row.values()), flush=True)
    return row


def check_faults(args: argparse.Namespace, cluster: Cluster, check: Check) -> None:
    """A run that loses hosts and gets them back has the losses of one on one host that nothing disturbs."""
    hosts = cluster.hosts
    every, whole = 5, args.processes * len(hosts)
    flags = ["--eval.every", 50, "--checkpoint.every", every]
    parts = ["--fsdp.strategy", args.strategy, "--fsdp.lost-seconds", args.lost_seconds]
    run = Run(args, cluster, "disturbed", args.processes, *flags, *parts).all(hosts, again=True)
    until(lambda: (run.last_step() > 0 and run.about()["world_size"] == whole) or run.errors(), "the first step of all")
    if said := run.errors():
        return check.add(f"{len(hosts)} hosts x {args.processes}", False, said[0])
    begun = time.monotonic()
    chance, kinds = random.Random(args.seed), list[str]()
    print(
        "fault, kind, host, at step, detected after s, next step after s, steps lost, processes left, returned after s"
    )
    for number in range(1, args.faults + 1):
        kinds = kinds or chance.sample(args.kinds, len(args.kinds))
        one_fault(run, check, chance, number, kinds.pop())
    minutes = (time.monotonic() - begun) / 60
    for host in hosts:
        host.kill()
        cluster.start(host)
    total = run.last_step() + 2
    last = ["--train.max-steps", total]
    run.flags += map(str, [*last, "--resume", "auto"])
    undisturbed = Run(args, cluster, "undisturbed", 1, *flags, *last, "--train.accumulate", whole)
    for other in (undisturbed.all(hosts[:1]), run.all(hosts)):
        other.wait()
    differs = difference(undisturbed.lines(), run.lines())
    worst = {
        key: max(row[key] for row in check.faults) for key in ("detected_after_s", "next_step_after_s", "steps_lost")
    }
    unnamed = [row["fault"] for row in check.faults if not row["names_it"]]
    check.add(
        f"{args.faults} faults on {len(hosts)} hosts x {args.processes}",
        differs < TOLERANCE and run.finished() and worst["steps_lost"] <= 2 * every and not unnamed,
        f"{total} steps, largest relative difference of the losses {differs:.1e}; at most {worst}; {minutes:.0f} minutes"
        + f"; the messages of {unnamed} do not name the host" * bool(unnamed),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a small model")
    parser.add_argument("--folder", type=Path, required=True, help="a new folder, for what the runs leave")
    parser.add_argument("--only", nargs="+", choices=("train", "faults"), default=["train", "faults"])
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1, help="on each host, where there are faults")
    parser.add_argument("--strategy", default="full-shard", help="where there are faults")
    parser.add_argument("--steps", type=int, default=20, help="where there are no faults")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lost-seconds", type=float, default=10)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/full_fsdp.py"))
    parser.add_argument(
        "--flags",
        default="--train.epochs 100000 --train.batch-size 1 --data.context-length 256 --fsdp.precision fp32 --optim.lr 1e-4 "
        "--optim.schedule constant",
        help="of the recipe",
    )
    args = parser.parse_args()
    args.folder, args.model = args.folder.resolve(), args.model.resolve()
    problem = None
    if not args.model.is_dir():
        problem = f"--model {args.model}: no such folder; give that of a small model"
    elif args.hosts < 2:
        problem = f"--hosts {args.hosts}: must be at least 2"
    elif args.folder.exists() and any(args.folder.iterdir()):
        problem = f"--folder {args.folder} holds other files: give a new one"
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    enter()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not namespaces():
        print(f"no namespaces here ({os.environ[INSIDE]}): hosts are addresses of the loopback, and none can be cut")
        args.kinds = [kind for kind in args.kinds if kind != "cut"]
    check = Check(args.folder)
    needed = [ROOT, Path(sys.prefix), Path(sys.base_prefix), args.folder, args.model]
    with Cluster(args.folder, args.hosts, needed) as cluster, rendezvous(cluster):
        if "train" in args.only:
            check_training(args, cluster, check)
        if "faults" in args.only:
            check_faults(args, cluster, check)
    return int(not all(row["passed"] for row in check.rows))


if __name__ == "__main__":
    sys.exit(main())
