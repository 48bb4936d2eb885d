"""`pretrain profile`: have a running job record some of its steps, without disturbing it.

The request reaches the job where its other wishes do: a local run by a file in its folder, which `pretrain run` takes
up; a job on Kubernetes by an annotation, which the operator sees. The answer is in the job's status.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from pretrain_api.messages.profile_request import ANNOTATION, InvalidProfile, ProfileRequest, parse_request
from pretrain_api.status.job import JobStatus, Profile
from pretrain_cli.errors import BadInput
from pretrain_operator.local.run_folder import RunFolder

LOOK_SECONDS = 0.25
KUBECTL_SECONDS = 30.0
FINAL_PHASES = ("Succeeded", "Failed")


class Unanswered(Exception):
    """The job has ended, or does not answer; the message says what to do."""


class Target(Protocol):
    """A running job."""

    def ask(self, request: ProfileRequest) -> None:
        """Put the request. Raises BadInput when there is no such job at work."""
        ...

    def status(self) -> JobStatus:
        """The job's status now."""
        ...


@dataclass(frozen=True)
class LocalTarget:
    """A run in a folder of this machine."""

    folder: RunFolder

    def ask(self, request: ProfileRequest) -> None:
        """Put the request into the folder, whole or not at all."""
        if not in_use(self.folder.path):
            raise BadInput(f"{self.folder.path}: no `pretrain run` works in this folder; start it, then ask again")
        draft = self.folder.request.with_name(f"{self.folder.request.name}.{request.id}")
        draft.write_text(request.text)
        draft.replace(self.folder.request)

    def status(self) -> JobStatus:
        """From `status.json`."""
        if not in_use(self.folder.path):
            raise Unanswered(f"the run in {self.folder.path} has ended: there is no profile")
        try:
            return JobStatus.from_json(self.folder.status.read_bytes())
        except FileNotFoundError:
            return JobStatus()


@dataclass(frozen=True)
class ClusterTarget:
    """A PretrainJob, reached by kubectl: with the rights and the context that its user has."""

    name: str
    namespace: str | None

    def ask(self, request: ProfileRequest) -> None:
        """Annotate the job."""
        self._kubectl("annotate", "pretrainjob", self.name, f"{ANNOTATION}={request.text}", "--overwrite")

    def status(self) -> JobStatus:
        """What of the job's status matters here."""
        found: Any = json.loads(self._kubectl("get", "pretrainjob", self.name, "--output", "json"))
        status: dict[str, Any] = found.get("status") or {}
        try:
            return JobStatus.model_validate({key: status[key] for key in ("phase", "profiles") if key in status})
        except ValidationError as error:
            raise Unanswered(
                f"{self.name}'s status is not understood ({error}): use this operator's version"
            ) from error

    def _kubectl(self, *arguments: str) -> str:
        where = ("--namespace", self.namespace) if self.namespace else ()
        try:
            ran = subprocess.run(
                ("kubectl", *arguments, *where), capture_output=True, text=True, timeout=KUBECTL_SECONDS
            )
        except FileNotFoundError as error:
            raise BadInput(
                f"{self.name} is no folder of a run, and there is no kubectl to ask a cluster with: name the folder "
                "that `pretrain run` works in, or install kubectl"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise Unanswered(f"kubectl did not answer within {KUBECTL_SECONDS:g} s") from error
        if ran.returncode:
            raise BadInput(ran.stderr.strip() or f"kubectl {arguments[0]} failed with exit code {ran.returncode}")
        return ran.stdout


def target(name: str, namespace: str | None) -> Target:
    """A run's folder if there is one of this name, else a job of the cluster."""
    path = Path(name)
    if namespace is None and (path.is_dir() or "/" in name):
        if not path.is_dir():
            raise BadInput(f"{name}: there is no such folder")
        return LocalTarget(RunFolder(path.absolute()))
    return ClusterTarget(name, namespace)


def profile(name: str, namespace: str | None, steps: int, rank: int, patience: float) -> int:
    """Ask, wait and say where the trace is; the exit code: 0 it is there, 1 there is none, 2 bad input."""
    try:
        request = parse_request(ProfileRequest(uuid.uuid4().hex[:12], steps, rank).text)
        found = target(name, namespace)
        found.ask(request)
        print(f"asked for {steps} step{'s' * (steps != 1)} of rank {rank}", file=sys.stderr)
        answer = await_answer(found, request, patience, time.monotonic, time.sleep)
    except (BadInput, InvalidProfile) as problem:
        print(problem, file=sys.stderr)
        return 2
    except (Unanswered, KeyboardInterrupt) as problem:
        print(problem if str(problem) else "not waited for: the job's status will tell", file=sys.stderr)
        return 1
    if answer.message:
        print(f"no profile: {answer.message}", file=sys.stderr)
        return 1
    print(
        f"{answer.location}\n"
        f"steps {answer.first_step} to {answer.last_step} of rank {answer.rank}, {answer.bytes / 2**20:.1f} MiB; "
        "open it in https://ui.perfetto.dev or chrome://tracing"
    )
    return 0


def await_answer(
    job: Target,
    request: ProfileRequest,
    patience: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> Profile:
    """What became of the request. Raises Unanswered after `patience` seconds, or when the job has ended."""
    deadline = clock() + patience
    while True:
        status = job.status()
        if answer := next((item for item in status.profiles if item.id == request.id), None):
            return answer
        if status.phase in FINAL_PHASES:
            raise Unanswered(f"the job has ended ({status.phase}): there is no profile")
        if clock() >= deadline:
            raise Unanswered(
                f"no answer within {patience:g} s: the job is {status.phase}; the request stands, and its status and "
                "Events will tell what became of it"
            )
        sleep(LOOK_SECONDS)


def in_use(folder: Path) -> bool:
    """Whether a run holds the lock of its folder."""
    try:
        with (folder / ".lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
