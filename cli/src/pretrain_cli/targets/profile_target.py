"""Running jobs that can be profiled: a local run, or a PretrainJob on a cluster."""

from __future__ import annotations

import fcntl
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from pretrain_api.messages.profile_request import ANNOTATION, ProfileRequest
from pretrain_api.status.job import JobStatus
from pretrain_cli.errors import BadInput
from pretrain_operator.local.run_folder import RunFolder

KUBECTL_SECONDS = 30.0


class ProfileUnanswered(Exception):
    """The job has ended, or does not answer; the message says what to do."""


class ProfileTarget(Protocol):
    """Running job."""

    def ask(self, request: ProfileRequest) -> None:
        """Submit the request. Raises BadInput if no such job is running."""
        ...

    def status(self) -> JobStatus:
        """Return the current status."""
        ...


@dataclass(frozen=True)
class LocalRunTarget:
    """Run in a folder of this machine."""

    folder: RunFolder

    def ask(self, request: ProfileRequest) -> None:
        """Write the request to the folder, atomically."""
        if not in_use(self.folder.path):
            raise BadInput(f"{self.folder.path}: no `pretrain run` is running in this folder: start it first")
        draft = self.folder.request.with_name(f"{self.folder.request.name}.{request.id}")
        draft.write_text(request.text)
        draft.replace(self.folder.request)

    def status(self) -> JobStatus:
        """Read `status.json`."""
        if not in_use(self.folder.path):
            raise ProfileUnanswered(f"the run in {self.folder.path} has ended: there is no profile")
        try:
            return JobStatus.from_json(self.folder.status.read_bytes())
        except FileNotFoundError:
            return JobStatus()


@dataclass(frozen=True)
class ClusterJobTarget:
    """PretrainJob, reached by kubectl with the user's context and permissions."""

    name: str
    namespace: str | None

    def ask(self, request: ProfileRequest) -> None:
        """Annotate the job."""
        self._kubectl("annotate", "pretrainjob", self.name, f"{ANNOTATION}={request.text}", "--overwrite")

    def status(self) -> JobStatus:
        """Return the phase and profiles of the job's status."""
        found: Any = json.loads(self._kubectl("get", "pretrainjob", self.name, "--output", "json"))
        status: dict[str, Any] = found.get("status") or {}
        try:
            return JobStatus.model_validate({key: status[key] for key in ("phase", "profiles") if key in status})
        except ValidationError as error:
            raise ProfileUnanswered(
                f"cannot parse the status of {self.name} ({error}): use the operator's version of pretrain"
            ) from error

    def _kubectl(self, *arguments: str) -> str:
        where = ("--namespace", self.namespace) if self.namespace else ()
        try:
            ran = subprocess.run(
                ("kubectl", *arguments, *where), capture_output=True, text=True, timeout=KUBECTL_SECONDS
            )
        except FileNotFoundError as error:
            raise BadInput(
                f"{self.name} is not the folder of a run, and kubectl is not installed: give the folder of a running "
                "`pretrain run`, or install kubectl"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise ProfileUnanswered(f"kubectl did not answer within {KUBECTL_SECONDS:g} s") from error
        if ran.returncode:
            raise BadInput(ran.stderr.strip() or f"kubectl {arguments[0]} failed with exit code {ran.returncode}")
        return ran.stdout


def profile_target(name: str, namespace: str | None) -> ProfileTarget:
    """Find the target: a run's folder of this name, or else a job on the cluster."""
    path = Path(name)
    if namespace is None and (path.is_dir() or "/" in name):
        if not path.is_dir():
            raise BadInput(f"there is no folder {name}")
        return LocalRunTarget(RunFolder(path.absolute()))
    return ClusterJobTarget(name, namespace)


def in_use(folder: Path) -> bool:
    """Return True while a run holds the lock of its folder."""
    try:
        with (folder / ".lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
