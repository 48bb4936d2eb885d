"""Pods without Kubernetes: namespaces of Linux in which a process finds what it would find in a pod, and no more.

Process 1 of its own, an address of its own on a network of its own, a name that nobody can resolve, a DNS server that
never answers, a read-only root with /tmp and /dev/shm in memory, a user that is in no list, no HOME. Takes root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[3]
GATEWAY = "10.77.0.254"
PLACE = "/mnt"
"""Where a pod finds the network's folder."""
USER = 65532
_CLONE_NEWNET = 0x40000000
_UNSHARE = ("unshare", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")


@dataclass
class Pod:
    """A process in namespaces of its own, and what it started."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path
    network: int
    """The process that keeps its network."""

    @property
    def first(self) -> psutil.Process:
        """Process 1; its pid is the one outside."""
        return psutil.Process(self.process.pid).children()[0]

    @property
    def agent(self) -> psutil.Process | None:
        """What runs below process 1; None: not yet. The shell that sets the pod up has children of its own."""
        with contextlib.suppress(IndexError, psutil.NoSuchProcess):
            first = self.first
            return None if first.name() == "sh" else first.children()[0]
        return None

    def inside(self, *command: str) -> str:
        """What a command prints in the pod's network."""
        entered = ["nsenter", "--target", str(self.network), "--net", *command]
        return subprocess.run(entered, capture_output=True, text=True, check=True, timeout=30).stdout


@dataclass
class Network:
    """A bridge to which pods are connected."""

    folder: Path
    """Readable in the pods, as PLACE."""
    pods: list[Pod] = field(default_factory=list)
    _keepers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _dns: socket.socket = field(init=False)

    def listen(self) -> socket.socket:
        """A socket at the GATEWAY, for a server of this process."""
        return self._open(lambda: socket.create_server((GATEWAY, 0)))

    def cut(self, pod: Pod) -> None:
        """Have everything to and from the pod lost in silence."""
        self._connect(pod, "nomaster")

    def heal(self, pod: Pod) -> None:
        """Undo a cut."""
        self._connect(pod, "master pods0")

    def _connect(self, pod: Pod, how: str) -> None:
        _in_network(self._keepers[0].pid, f"ip link set v{1 + self.pods.index(pod)} {how}")

    def questions(self) -> int:
        """How often a pod has asked for a name or an address since the last call."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while self._dns.recv(4096):
                count += 1
        return count

    def _open(self, make: Callable[[], socket.socket]) -> socket.socket:
        """A socket of this process on the pods' network."""
        made: list[socket.socket] = []

        def enter_and_make() -> None:
            with open(f"/proc/{self._keepers[0].pid}/ns/net") as network:
                if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), _CLONE_NEWNET) == 0:
                    made.append(make())

        thread = threading.Thread(target=enter_and_make)  # Only this thread enters, and it ends.
        thread.start()
        thread.join()
        return made[0]

    def _open_hub(self) -> None:
        hub = self._keep_network().pid
        _in_network(hub, f"ip link add pods0 type bridge; ip addr add {GATEWAY}/24 dev pods0; ip link set pods0 up")
        self._dns = self._open(_deaf_dns)

    def start(self, *command: str) -> Pod:
        """Run a command as process 1 of a new pod; `{address}` in it is the pod's."""
        number = len(self.pods) + 1
        address = f"10.77.0.{number}"
        keeper = self._keep_network()
        hub, own = self._keepers[0].pid, keeper.pid
        _in_network(
            hub, f"ip link add v{number} type veth peer name eth0 netns {own}; ip link set v{number} master pods0 up"
        )
        _in_network(
            own,
            f"ip link set lo up; ip addr add {address}/24 dev eth0; ip link set eth0 up",
        )
        log = self.folder / f"pod-{number}.log"
        script = _setup(self.folder, number) + "exec " + shlex.join(
            ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs", "--bounding-set=-all",
             *(part.format(address=address) for part in command)]
        )  # fmt: skip
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["nsenter", "--target", str(own), "--net", *_UNSHARE, "sh", "-euc", script],
                stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd="/",
                env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            )  # fmt: skip
        self.pods.append(Pod(address, process, log, own))
        return self.pods[-1]

    def close(self) -> None:
        """End all pods and the network."""
        self._dns.close()
        for pod in self.pods:  # Process 1 outlives unshare: who changes his user is no longer killed with his parent.
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                pod.first.kill()
        for process in [*(pod.process for pod in self.pods), *reversed(self._keepers)]:
            process.kill()  # The kernel kills what is below process 1.
            process.wait()

    def _keep_network(self) -> subprocess.Popen[bytes]:
        # It says a word once it is in its network.
        keeper = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo in; exec sleep infinity"], stdout=subprocess.PIPE
        )
        self._keepers.append(keeper)
        assert keeper.stdout is not None
        keeper.stdout.readline()
        keeper.stdout.close()
        return keeper


@contextlib.contextmanager
def a_network() -> Iterator[Network]:
    """A network without pods yet."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        network = Network(Path(folder))
        try:
            network._open_hub()
            yield network
        finally:
            network.close()


def _deaf_dns() -> socket.socket:
    taken = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    taken.bind((GATEWAY, 53))
    taken.setblocking(False)
    return taken


def _in_network(keeper: int, script: str) -> None:
    subprocess.run(["nsenter", "--target", str(keeper), "--net", "sh", "-euc", script], check=True)


def _setup(folder: Path, number: int) -> str:
    """Makes the file system and the name."""
    hosts, resolver = folder / "hosts", folder / "resolv.conf"
    hosts.write_text("127.0.0.1 localhost\n")
    resolver.write_text(f"nameserver {GATEWAY}\n")
    return f"""
hostname pod-{number}
mount --bind {hosts} /etc/hosts
mount --bind {resolver} /etc/resolv.conf
mount --bind {folder} {PLACE}
{_hide_all_but((Path(sys.base_prefix), ROOT))}
mount -o remount,bind,ro {PLACE}
mount -o remount,bind,ro /
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
cd /
"""


def _hide_all_but(needed: tuple[Path, ...]) -> str:
    """An empty /tmp, and the user let in where the interpreter and the project are, should that be in somebody's home
    or in /tmp."""
    closed = {path: next((it for it in path.parents if not it.stat().st_mode & 0o001), None) for path in needed}
    hidden = [path for path in needed if closed[path] or path.is_relative_to("/tmp")]
    lines = ["mount -t tmpfs tmpfs /media"]
    for number, path in enumerate(hidden):
        lines += [f"mkdir /media/{number}", f"mount --bind {path} /media/{number}"]
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {it}" for it in sorted({it for it in closed.values() if it})]
    lines += ["mount -t tmpfs -o mode=1777 tmpfs /tmp"]
    for number, path in enumerate(hidden):
        lines += [f"mkdir -p {path}", f"mount --move /media/{number} {path}", f"mount -o remount,bind,ro {path}"]
    return "\n".join([*lines, "umount /media"])
