"""An API server for tests: etcd and kube-apiserver on the loopback, without controllers and nodes.

Nothing deletes what a namespace or an owner leaves behind. No service account is needed for pods.
"""

from __future__ import annotations

import json
import os
import secrets
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from support.kubernetes.tls import Authority
from support.ports import free_port
from support.tools import API_SERVER, require

START_SECONDS = 120.0
ISSUER = "https://kubernetes.default.svc.cluster.local"


@dataclass(frozen=True)
class ControlPlane:
    """Where it is, and its processes."""

    kubeconfig: Path
    """Of an administrator; the key that signs the tokens of service accounts, `sa.key`, is beside it."""
    etcd: str
    """URL."""
    kubectl: Path
    processes: tuple[int, ...]
    """Pids of etcd and kube-apiserver."""


@contextmanager
def control_plane() -> Iterator[ControlPlane]:
    """An API server that is ready, until the end of the block; skips the test where there are no programs for it."""
    programs = require(API_SERVER)
    with tempfile.TemporaryDirectory(prefix="control-plane-") as made, ExitStack() as running:
        folder = Path(made)
        token, address = secrets.token_hex(16), f"https://127.0.0.1:{(port := free_port())}"
        _write_secrets(folder, token, address)
        etcd = f"http://127.0.0.1:{free_port()}"
        started = (
            running.enter_context(_process(_etcd(programs["etcd"], folder, etcd), folder)),
            running.enter_context(_process(_kube_apiserver(programs["kube-apiserver"], folder, etcd, port), folder)),
        )
        _wait_ready(address, token, folder, started)
        pids = tuple(process.pid for process in started)
        yield ControlPlane(folder / "kubeconfig", etcd, programs["kubectl"], pids)


def _write_secrets(folder: Path, token: str, address: str) -> None:
    """Write everything that identifies the server and its administrator."""
    authority = Authority("control-plane")
    authority.server(folder, "127.0.0.1")
    (folder / "ca.crt").write_text(authority.pem)
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    (folder / "sa.key").write_bytes(key)
    (folder / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": "tests", "cluster": {"server": address, "certificate-authority": str(folder / "ca.crt")}}
        ],
        "users": [{"name": "admin", "user": {"token": token}}],
        "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "admin"}}],
        "current-context": "tests",
    }
    (folder / "kubeconfig").write_text(json.dumps(config))


def _etcd(program: Path, folder: Path, url: str) -> list[str]:
    peer = f"http://127.0.0.1:{free_port()}"
    return [
        str(program),
        f"--data-dir={folder / 'etcd'}",
        "--unsafe-no-fsync",
        "--log-level=warn",
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
    ]


def _kube_apiserver(program: Path, folder: Path, etcd: str, port: int) -> list[str]:
    return [
        str(program),
        f"--etcd-servers={etcd}",
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        f"--tls-cert-file={folder / 'tls.crt'}",
        f"--tls-private-key-file={folder / 'tls.key'}",
        f"--cert-dir={folder}",
        f"--token-auth-file={folder / 'tokens.csv'}",
        "--authorization-mode=RBAC",
        "--allow-privileged=true",
        "--disable-admission-plugins=ServiceAccount",
        "--service-cluster-ip-range=10.96.0.0/16",
        f"--service-account-issuer={ISSUER}",
        f"--service-account-key-file={folder / 'sa.key'}",
        f"--service-account-signing-key-file={folder / 'sa.key'}",
    ]


@contextmanager
def _process(command: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, so that Ctrl-C ends the tests first; ended with the block."""
    with (folder / f"{Path(command[0]).name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, process_group=0, env=_environ())
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environ() -> dict[str, str]:
    """Environment without the variables that etcd takes for options."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}


def _wait_ready(address: str, token: str, folder: Path, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until the server says that it is ready and has its first namespace."""
    trust = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    deadline = time.monotonic() + START_SECONDS
    for path in ("/readyz", "/api/v1/namespaces/default"):
        request = urllib.request.Request(address + path, headers={"Authorization": f"Bearer {token}"})
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5, context=trust):
                    break
            except OSError as error:
                if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                    logs = "\n".join(log.read_text()[-2000:] for log in folder.glob("*.log"))
                    raise AssertionError(f"the API server is not ready: {error}\n{logs}") from error
                time.sleep(0.1)
