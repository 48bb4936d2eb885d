"""A real cluster for tests: kubectl, helm, images, faults, S3, a namespace for each test.

`examples/kind/up` makes the cluster; `conftest.py` beside the tests turns all of this into fixtures.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tools.fetch_tools import prebuilt_cluster

ROOT = Path(__file__).parents[3]
PREBUILT = prebuilt_cluster(os.environ)
VERSION = "0.1.0"
OPERATOR_IMAGE, TRAINER_IMAGE = f"pretrain-operator:{VERSION}", f"pretrain-trainer:{VERSION}"
RELEASE, SYSTEM = "pretrain-operator", "pretrain-system"
CHART = ROOT / "charts" / "pretrain-operator"
PROGRESS_SECONDS = 0.3
"""Nearly every step is to be seen in the status."""
ACTIVE = "pretrain.dev/active=true"

Object = dict[str, Any]
T = TypeVar("T")


class Refused(Exception):
    """What kubectl, helm or docker said."""


def wait_until(look: Callable[[], T | None], what: str, timeout: float = 60.0) -> T:
    """What `look` returns once that is true; AssertionError after the timeout."""
    end = time.monotonic() + timeout
    while not (found := look()):
        assert time.monotonic() < end, f"not within {timeout:g} s: {what}"
        time.sleep(0.2)
    return found


@dataclass(frozen=True)
class Process:
    """A process in a pod: its id on the node, its id in the pod, its command line."""

    node: str
    pid: int
    pid_in_pod: int
    command: str


@dataclass(frozen=True)
class Cluster:
    """The cluster and its S3 service, by command line tools."""

    environment: Mapping[str, str]

    def run(self, *command: str, given: str | None = None, timeout: float = 120.0) -> str:
        """The output of a program; raises Refused with what it said."""
        ran = subprocess.run(
            command, input=given, env=dict(self.environment), cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )
        if ran.returncode:
            raise Refused(f"{shlex.join(command[:6])}: {ran.stderr.strip() or ran.stdout.strip()}")
        return ran.stdout

    def kubectl(self, *arguments: str, given: object = None, timeout: float = 120.0) -> str:
        """The output of kubectl; `given`, an object or a list of them, becomes its input."""
        if isinstance(given, list):
            given = {"apiVersion": "v1", "kind": "List", "items": given}
        return self.run("kubectl", *arguments, given=None if given is None else json.dumps(given), timeout=timeout)

    def get(self, *arguments: str) -> Object:
        """`kubectl get` as an object."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def items(self, *arguments: str) -> list[Object]:
        """`kubectl get` as a list of objects."""
        return self.get(*arguments)["items"]

    def helm(self, *arguments: str, timeout: float = 240.0) -> str:
        """The output of helm."""
        return self.run("helm", *arguments, timeout=timeout)

    @property
    def s3_endpoint(self) -> str:
        """The URL of the S3 service, here and in pods."""
        return self.environment["AWS_ENDPOINT_URL"]

    # The operator

    def install(self, *settings: str) -> None:
        """Install or upgrade the chart and wait until it is up; `settings` are helm's options."""
        build = self.run("docker", "image", "inspect", "--format", "{{.Id}}", OPERATOR_IMAGE).strip()
        self.helm(
            "upgrade", "--install", RELEASE, str(CHART), "--namespace", SYSTEM, "--create-namespace", "--wait",
            "--timeout", "3m", "--set", f"image.tag={VERSION}", "--set", f"workers.image={TRAINER_IMAGE}",
            "--set-string", f"podAnnotations.build={build}",  # another build has the same tag
            "--set-string", f"env[0].name=PRETRAIN_PROGRESS_SECONDS,env[0].value={PROGRESS_SECONDS}", *settings,
        )  # fmt: skip

    def active_operator(self) -> str:
        """The name of the pod of the replica that acts."""

        def only_one() -> str | None:
            pods = self.items("pods", "-n", SYSTEM, "-l", ACTIVE)
            alive = [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]
            return alive[0] if len(alive) == 1 else None

        return wait_until(only_one, "one replica of the operator is the active one")

    def active_operator_node(self) -> str:
        """Where that pod is."""
        return self.get("pod", self.active_operator(), "-n", SYSTEM)["spec"]["nodeName"]

    def kill_active_operator(self) -> str:
        """Delete the active replica's pod at once; returns its name."""
        name = self.active_operator()
        self.kubectl("delete", "pod", name, "-n", SYSTEM, "--grace-period=0", "--force")
        return name

    def operator_logs(self) -> str:
        """The last lines of all replicas."""
        return self.kubectl(
            "logs", "-n", SYSTEM, "-l", f"app.kubernetes.io/instance={RELEASE}", "--tail=200", "--prefix"
        )

    # Faults of nodes

    def workers(self) -> list[str]:
        """The names of the nodes that run pods."""
        nodes = self.items("nodes", "-l", "!node-role.kubernetes.io/control-plane")
        return [node["metadata"]["name"] for node in nodes]

    @contextmanager
    def node_killed(self, node: str) -> Iterator[None]:
        """The machine is off, as if the power had gone; on again afterwards."""
        self.run("docker", "kill", node)
        try:
            yield
        finally:
            self.run("docker", "start", node)
            self.node_ready(node)

    @contextmanager
    def node_paused(self, node: str) -> Iterator[None]:
        """No process of the node runs: its peers get neither FIN nor RST."""
        self.run("docker", "pause", node)
        try:
            yield
        finally:
            self.run("docker", "unpause", node)
            self.node_ready(node)

    @contextmanager
    def network_cut(self, node: str) -> Iterator[None]:
        """Every packet from and to the node is lost; what runs on it goes on."""
        rules = ("INPUT -i eth0", "OUTPUT -o eth0", "FORWARD -i eth0", "FORWARD -o eth0")

        def iptables(action: str) -> None:
            for rule in rules:
                self.run("docker", "exec", node, "iptables", "-w", action, *rule.split(), "-j", "DROP")

        iptables("-I")
        try:
            yield
        finally:
            iptables("-D")
            self.node_ready(node)

    @contextmanager
    def node_drained(self, node: str) -> Iterator[None]:
        """The node's pods are evicted and no new ones come."""
        self.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", timeout=240)
        try:
            yield
        finally:
            self.kubectl("uncordon", node)

    def node_ready(self, node: str) -> None:
        """Wait until the node takes pods (again)."""
        self.kubectl("wait", "--for=condition=Ready", f"node/{node}", "--timeout=180s", timeout=200)

    # S3

    @contextmanager
    def s3_stopped(self) -> Iterator[None]:
        """Nobody answers at the S3 service's address. Only with the prebuilt cluster's server, which keeps objects."""
        self.run(str(PREBUILT / "s3"), "stop")
        try:
            yield
        finally:
            self.run(str(PREBUILT / "s3"), "start")

    def upload(self, folder: Path, uri: str) -> None:
        """Put a folder's files that are not there yet."""
        self.run(str(ROOT / ".venv/bin/python"), "examples/kind/upload.py", str(folder), uri)

    # Processes in pods

    def processes(self, namespace: str, pod: str) -> list[Process]:
        """What runs in a pod, but for the container that holds its network."""
        found = self.get("pod", pod, "-n", namespace)
        uid: str = found["metadata"]["uid"]
        script = (
            f"for p in $(grep -lE 'pod({uid}|{uid.replace('-', '_')})' /proc/[0-9]*/cgroup 2>/dev/null); do "
            "d=${p%/cgroup}; "
            'echo "${d#/proc/}" $(grep NSpid $d/status | cut -f2-) -- $(tr "\\0" " " < $d/cmdline); done'
        )
        lines = self.run("docker", "exec", found["spec"]["nodeName"], "sh", "-c", script).splitlines()
        parsed = [(head.split(), command) for head, _, command in (line.partition(" -- ") for line in lines)]
        return [
            Process(found["spec"]["nodeName"], int(ids[0]), int(ids[-1]), command)
            for ids, command in parsed
            if command and not command.startswith("/pause")
        ]

    def kill(self, process: Process, signal: str = "KILL") -> None:
        """Send a signal to a process in a pod, as its node's kernel would."""
        self.run("docker", "exec", process.node, "kill", f"-{signal}", str(process.pid))


def connect() -> Cluster:
    """The cluster of this machine, started if it is not up."""
    started = subprocess.run(
        [ROOT / "examples/kind/up"], check=True, stdout=subprocess.PIPE, text=True, timeout=900
    ).stdout
    exports = dict(
        part.split("=", 1) for line in started.splitlines() for part in shlex.split(line.removeprefix("export "))
    )
    path = exports.pop("PATH", "$PATH").replace("$PATH", os.environ["PATH"])
    return Cluster({**os.environ, **exports, "PATH": path})
