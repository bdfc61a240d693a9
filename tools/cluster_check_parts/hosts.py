"""Hosts on one machine: each a network of its own behind a bridge, with its own hostname, processes, /tmp and cache.

Linux namespaces, made with `unshare`, `nsenter` and `ip`, by root or by any user who may make user namespaces. All is in
namespaces of the process that called `enter`, so nothing is left when it ends. Where that is not allowed, hosts are
addresses 127.0.0.1, 127.0.0.2, ... of one loopback, with folders of their own: `cut` is not possible there.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

NETWORK = "10.77.0"
INSIDE = "MINILLAMA_CLUSTER_CHECK"
"""Set in the process that `enter` has started again"""

# As process 1 of a host. /tmp is its own; what it needs below the real /tmp is mounted there at the same place.
START = """
set -e
name=$1 folder=$2; shift 2
hostname "$name"
mount --bind "$folder/hosts" /etc/hosts
mkdir -p "$folder/$name/tmp"
for needed in "$@"; do
    case $needed in /tmp/*)
        mkdir -p "$folder/$name$needed"
        mount --bind "$needed" "$folder/$name$needed"
    esac
done
mount --rbind "$folder/$name/tmp" /tmp
mkdir -p /tmp/home
ip link set lo up
echo ready
exec sleep infinity
"""


def obstacle() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    if missing := [name for name in ("unshare", "nsenter", "ip", "mount") if shutil.which(name) is None]:
        return f"{', '.join(missing)} is not installed"
    trial = "ip link add bridge0 type bridge && ip link add port0 type veth peer name eth0 && mount -t tmpfs none /mnt"
    tried = subprocess.run([*_unshare(), "sh", "-c", trial], capture_output=True, text=True)
    return None if tried.returncode == 0 else tried.stderr.strip().splitlines()[-1]


def _unshare() -> list[str]:
    users = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *users, "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]


def enter() -> None:
    """Starts this program again in namespaces of its own, unless it runs there already or they are not allowed."""
    if INSIDE in os.environ:
        return
    os.environ[INSIDE] = obstacle() or "yes"
    if not namespaces():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through Cluster.__exit__, which ends what runs
    else:
        inside = subprocess.Popen([*_unshare(), sys.executable, "-u", *sys.argv])  # which takes no SIGTERM
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: inside.kill())
        sys.exit(inside.wait())


def namespaces() -> bool:
    return os.environ[INSIDE] == "yes"


@dataclass
class Host:
    number: int
    """From 1"""
    address: str
    folder: Path
    """Its home, /tmp and cache are in it"""
    holder: "subprocess.Popen[str] | None" = None
    """With namespaces: the parent of the host's process 1"""
    commands: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"host{self.number}"

    def _first(self) -> int:
        """The host's process 1, as this machine counts it."""
        assert self.holder
        return int(Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()[0])

    def run(self, command: list[str], log: Path, env: dict[str, str]) -> "subprocess.Popen[bytes]":
        """Starts a command on this host. Its output is appended to log."""
        if self.holder:
            home = Path("/tmp/home")
            command = ["nsenter", "-t", str(self._first()), "-n", "-u", "-m", "-p", "--wd=/", "--", *command]
        else:
            home = self.folder / self.name / "tmp/home"
            home.mkdir(parents=True, exist_ok=True)
            env = env | {"TMPDIR": str(home.parent)}
        env = os.environ | {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")} | env
        with log.open("ab") as file:
            process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
        self.commands.append(process)
        return process

    def kill(self) -> None:
        """Ends all its processes at once, and with them its network."""
        if self.holder:
            os.kill(self._first(), signal.SIGKILL)
            while self.holder.poll() is None:
                for process in self.commands:  # an nsenter that has stopped with its command must see that one's end
                    process.send_signal(signal.SIGCONT)
                time.sleep(0.02)
        for process in self.commands:
            if not self.holder:
                _signal_tree(process.pid, signal.SIGKILL)
            process.wait()
        self.commands.clear()

    def cut(self, connected: bool = False) -> None:
        """Takes its link down, so that nobody is told, not even by a FIN; or up again."""
        subprocess.run(["ip", "link", "set", f"port{self.number}", "up" if connected else "down"], check=True)

    def freeze(self, go_on: bool = False) -> None:
        """Stops all its processes; or lets them go on."""
        number = signal.SIGCONT if go_on else signal.SIGSTOP
        for process in self.commands:
            _signal_tree(process.pid, number)


def _signal_tree(pid: int, number: int) -> None:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        children = listed.read_text().split()
        if number != signal.SIGCONT:
            os.kill(pid, number)
        for child in children:
            _signal_tree(int(child), number)
        if number == signal.SIGCONT:  # nsenter stops again if what it started has stopped
            os.kill(pid, number)
    except (FileNotFoundError, ProcessLookupError):
        return


@dataclass
class Cluster:
    """Hosts joined by a bridge, on which this process has an address too."""

    folder: Path
    count: int
    needed: list[Path]
    """Folders that every host sees"""
    hosts: list[Host] = field(default_factory=list)
    port: int = 0
    """Of this process, where the hosts' programs find each other"""

    @property
    def address(self) -> str:
        """Of this process, on the bridge"""
        return f"{NETWORK}.254" if namespaces() else "127.0.0.1"

    @property
    def interface(self) -> str:
        """Of each host, to the bridge"""
        return "eth0" if namespaces() else "lo"

    def __enter__(self) -> "Cluster":
        numbers = range(1, self.count + 1)
        if namespaces():
            _ip("link set lo up")
            _ip("link add bridge0 address 02:00:00:00:00:fe type bridge")  # or it changes with the ports
            _ip(f"addr add {self.address}/24 dev bridge0")
            _ip("link set bridge0 up")
            lines = [f"{NETWORK}.{n} host{n}\n" for n in numbers]
            (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        for n in numbers:
            address = f"{NETWORK}.{n}" if namespaces() else f"127.0.0.{n}"
            self.hosts.append(Host(n, address, self.folder))
            self.start(self.hosts[-1])
        return self

    def start(self, host: Host) -> None:
        """Boots a host that is off."""
        if not namespaces():
            return
        needed = [str(path.resolve()) for path in self.needed]
        host.holder = subprocess.Popen(
            [*_unshare()[:1], *_unshare()[-7:], "bash", "-c", START, "bash", host.name, str(self.folder), *needed],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert host.holder.stdout and host.holder.stdout.readline() == "ready\n", f"{host.name} does not start"
        port = f"port{host.number}"
        subprocess.run(["ip", "link", "del", port], capture_output=True)  # of its last life, if that is not gone yet
        card = f"eth0 address 02:00:00:00:00:{host.number:02x}"  # the same in each life, as a machine's
        _ip(f"link add {port} type veth peer name {card} netns {host.holder.pid}")
        _ip(f"link set {port} master bridge0 up")
        inside = ["nsenter", "-t", str(host.holder.pid), "-n", "ip"]
        subprocess.run([*inside, *f"addr add {host.address}/24 dev eth0".split()], check=True)
        subprocess.run([*inside, "link", "set", "eth0", "up"], check=True)

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.kill()
        if namespaces():
            _ip("link del bridge0")


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)
