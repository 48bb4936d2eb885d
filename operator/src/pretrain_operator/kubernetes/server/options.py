"""How the operator is started: flags, each with an environment variable as its default."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pretrain_operator.kubernetes.leader.lease import DURATION_SECONDS
from pretrain_operator.kubernetes.workload.settings import PodSettings


class BadOptions(Exception):
    """The operator can't be started like this; the message says which flag to mend, and how."""


@dataclass(frozen=True)
class Options:
    """One operator process."""

    coordinator_host: str
    """Name under which worker pods reach the active replica: the Service's."""
    namespace: str | None = None
    """The only namespace whose jobs are served; None: all namespaces."""
    listen: str = ""
    """Address on which the servers listen; empty: all of the machine's."""
    agents_port: int = 8443
    metrics_port: int = 8080
    probe_port: int = 8081
    tls_dir: Path | None = None
    """Folder with tls.crt, tls.key and ca.crt. None: agents connect without TLS, which is for tests only."""
    audience: str = "pretrain-operator"
    """Of the tokens that agents show."""
    lease_name: str = "pretrain-operator"
    lease_seconds: int = DURATION_SECONDS
    """So long after its last renewal a replica that vanished is replaced."""
    progress_seconds: float = 5.0
    """Between two writes of a job's status for nothing but progress: each is a write of the API server's database."""
    pod_name: str = ""
    """Of this replica, which then labels itself while it is active; empty: it runs in no pod."""
    pod_ip: str = ""
    """Of this replica: where the others see whether it is there."""
    pod_namespace: str = "default"
    """Where the Lease is, and the pods of this operator."""
    service_accounts: tuple[str, ...] = ("default",)
    """What jobs may run as."""
    default_image: str = ""
    """For jobs that name no image; empty: the resource's default."""
    kubeconfig: Path | None = None
    """None: the cluster around this pod, else KUBECONFIG's."""

    @property
    def address(self) -> str:
        """Where this process answers as long as it lives, `host:port`; empty: not known."""
        host = f"[{self.pod_ip}]" if ":" in self.pod_ip else self.pod_ip
        return f"{host}:{self.probe_port}" if host else ""

    def pod_settings(self) -> PodSettings:
        """What worker pods are made from. Reads the certificate's authority: raises BadOptions."""
        scheme = "ws" if self.tls_dir is None else "wss"
        return PodSettings(
            coordinator_url=f"{scheme}://{self.coordinator_host}:{self.agents_port}",
            audience=self.audience,
            ca="" if self.tls_dir is None else _read(self.tls_dir / "ca.crt"),
            default_image=self.default_image,
            allowed_service_accounts=self.service_accounts,
        )


def parse_options(arguments: Sequence[str], environment: Mapping[str, str]) -> Options:
    """The options of a command line. Raises BadOptions."""
    parser = _Parser(prog="pretrain-operator", description="Runs PretrainJobs on Kubernetes.", allow_abbrev=False)

    def flag(name: str, variable: str, help: str, default: str = "", type: Callable[[str], object] = str) -> None:
        parser.add_argument(
            name, type=type, default=environment.get(variable, default), help=f"{help} (${variable})", metavar="VALUE"
        )

    flag("--namespace", "PRETRAIN_NAMESPACE", "serve this namespace only; default: all")
    flag("--coordinator-host", "PRETRAIN_COORDINATOR_HOST", "host name at which worker pods reach the active replica")
    flag("--listen", "PRETRAIN_LISTEN", "address to listen on; default: all")
    flag("--agents-port", "PRETRAIN_AGENTS_PORT", "port for the workers' agents", "8443", _port)
    flag("--metrics-port", "PRETRAIN_METRICS_PORT", "port for /metrics and /readyz", "8080", _port)
    flag("--probe-port", "PRETRAIN_PROBE_PORT", "port for /healthz", "8081", _port)
    flag("--tls-dir", "PRETRAIN_TLS_DIR", "folder with tls.crt, tls.key, ca.crt; without it: no TLS, for tests only")
    flag("--audience", "PRETRAIN_AUDIENCE", "audience of the agents' tokens", Options.audience)
    flag("--lease-name", "PRETRAIN_LEASE_NAME", "Lease that names the active replica", Options.lease_name)
    flag("--lease-seconds", "PRETRAIN_LEASE_SECONDS", "the Lease's duration", str(Options.lease_seconds), _seconds)
    progress = "between two writes of a job's status for nothing but progress"
    flag("--progress-seconds", "PRETRAIN_PROGRESS_SECONDS", progress, str(Options.progress_seconds), _duration)
    flag("--pod-name", "POD_NAME", "name of this replica's pod")
    flag("--pod-ip", "POD_IP", "address of this replica's pod")
    flag("--pod-namespace", "POD_NAMESPACE", "namespace of the operator", Options.pod_namespace)
    flag("--service-accounts", "PRETRAIN_SERVICE_ACCOUNTS", "what jobs may run as, comma-separated", "default", _names)
    flag("--default-image", "PRETRAIN_DEFAULT_IMAGE", "trainer image of jobs that name none")
    flag("--kubeconfig", "PRETRAIN_KUBECONFIG", "default: the cluster around this pod, else $KUBECONFIG's")
    given = parser.parse_args(arguments)
    if not given.coordinator_host:
        raise BadOptions("--coordinator-host is missing: give the name of the Service that leads to the operator")
    return Options(
        coordinator_host=given.coordinator_host,
        namespace=given.namespace or None,
        listen=given.listen,
        agents_port=given.agents_port,
        metrics_port=given.metrics_port,
        probe_port=given.probe_port,
        tls_dir=Path(given.tls_dir) if given.tls_dir else None,
        audience=given.audience,
        lease_name=given.lease_name,
        lease_seconds=given.lease_seconds,
        progress_seconds=given.progress_seconds,
        pod_name=given.pod_name,
        pod_ip=given.pod_ip,
        pod_namespace=given.pod_namespace,
        service_accounts=given.service_accounts,
        default_image=given.default_image,
        kubeconfig=Path(given.kubeconfig) if given.kubeconfig else None,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadOptions(message)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 0 (any free one) to 65535")
    return int(text)


def _seconds(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: give whole seconds from 1 to 600")
    return int(text)


def _duration(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: give seconds from 0.1 to 600")
    return seconds


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise BadOptions(
            f"--tls-dir: {path} can't be read ({error.strerror}): mount the operator's certificate"
        ) from error
