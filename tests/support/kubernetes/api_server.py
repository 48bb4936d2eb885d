"""A real API server for tests: found, started, given the CustomResourceDefinition, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain_operator.kubernetes.client.api import Api
from support.kubernetes.control_plane import ControlPlane, control_plane

ROOT = Path(__file__).parents[3]
CRD = ROOT / "crds" / "pretrain.dev_pretrainjobs.yaml"
RESOURCE = "pretrainjobs.pretrain.dev"


class Refused(Exception):
    """What kubectl said."""


@dataclass(frozen=True)
class ApiServer:
    """One API server, and kubectl against it."""

    plane: ControlPlane

    @property
    def kubeconfig(self) -> Path:
        """Of an administrator."""
        return self.plane.kubeconfig

    @property
    def environment(self) -> Mapping[str, str]:
        """Environment of commands that talk to it."""
        path = f"{self.plane.kubectl.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig), "PATH": path}

    def kubectl(self, *arguments: str, given: object = None) -> str:
        """The output; raises Refused with what kubectl said."""
        text = json.dumps(given) if given is not None else None
        ran = subprocess.run(
            [self.plane.kubectl, *arguments],
            input=text,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if ran.returncode:
            raise Refused(ran.stderr)
        return ran.stdout

    def create(self, document: dict[str, Any]) -> dict[str, Any]:
        """The object as the server would keep it."""
        made = self.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", given=document)
        return json.loads(made)

    def service_account(self, namespace: str, name: str, folder: Path) -> Path:
        """Make a service account, which may do nothing yet; returns a kubeconfig of it."""
        self.kubectl("-n", namespace, "create", "serviceaccount", name)
        return self.kubeconfig_of(namespace, name, folder)

    def kubeconfig_of(self, namespace: str, name: str, folder: Path) -> Path:
        """A kubeconfig of a service account that exists."""
        config = json.loads(self.kubectl("config", "view", "--raw", "-o", "json"))
        config["users"] = [
            {"name": user["name"], "user": {"token": self.token(namespace, name)}} for user in config["users"]
        ]
        path = folder / f"{name}.kubeconfig"
        path.write_text(json.dumps(config))
        return path

    def token(self, namespace: str, service_account: str) -> str:
        """A new token of a service account."""
        return self.kubectl("-n", namespace, "create", "token", service_account).strip()

    def forget_history(self, version: str) -> None:
        """Make etcd forget what was before this resource version: watches from an older one are `Expired`, unless the
        API server still has it in a cache (of Events it has none)."""
        body = json.dumps({"revision": version, "physical": True}).encode()
        with urllib.request.urlopen(f"{self.plane.etcd}/v3/kv/compaction", data=body, timeout=10) as answer:
            answer.read()


@contextlib.asynccontextmanager
async def connected(kubeconfig: Path | None = None, **options: Any) -> AsyncIterator[Api]:
    """A client for a while."""
    api = await Api.connect(kubeconfig=kubeconfig, **options)
    try:
        yield api
    finally:
        await api.close()


@contextlib.contextmanager
def started_api_server() -> Iterator[ApiServer]:
    """An API server with our CustomResourceDefinition; skips the test where there are no programs for it."""
    with control_plane() as plane:
        server = ApiServer(plane)
        server.kubectl("create", "-f", str(CRD))
        _established(server)
        yield server


def _established(server: ApiServer) -> None:
    """Wait until our resource is served. `kubectl wait` fails at once while the definition has no conditions yet."""
    end = time.monotonic() + 60
    while True:
        try:
            server.kubectl("wait", "--for=condition=Established", f"crd/{RESOURCE}", "--timeout=30s")
            return
        except Refused:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
