"""The port to whatever runs the workers: Kubernetes, or local processes. `plan` cannot tell them apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from pretrain_api.messages.profile_request import InvalidRequest, ProfileRequest
from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import JobStatus

PodPhase = Literal["Pending", "Running", "Succeeded", "Failed"]


@dataclass(frozen=True)
class Pod:
    """A worker: a pod on Kubernetes, a process group on one machine. Identified by (slot, attempt)."""

    slot: int
    attempt: int
    phase: PodPhase
    node: str = ""
    deleting: bool = False
    created_at: float = 0.0
    """Unix seconds."""
    finished_at: float | None = None
    exit_code: int | None = None
    reason: str = ""
    """Of a pod that ended: why (`OOMKilled`, `Evicted`, `Error`, …). Of one that is pending: what it waits for
    (`Unschedulable`, `ImagePullBackOff`, `CreateContainerConfigError`, …), empty while all is in order."""
    message: str = ""
    node_ready: bool | None = None
    """What the cluster says of its node; None: it says nothing, or nodes cannot be read."""

    @property
    def alive(self) -> bool:
        """Its processes may still run."""
        return self.phase in ("Pending", "Running")


@dataclass(frozen=True)
class Placement:
    """Where a new pod should run and how long it may take to end."""

    never: frozenset[str] = frozenset()
    """Nodes that it must not be put on: nothing there answers."""
    rather_not: frozenset[str] = frozenset()
    """Nodes to avoid where others will do."""
    grace_seconds: float = 30.0
    """From SIGTERM to SIGKILL: time for a checkpoint."""


class Refused(OSError):
    """The cluster understood, said no, and will go on saying no until somebody mends it: quota, admission, rights."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        """CamelCase, for conditions: `QuotaExceeded`, `Forbidden`, `Invalid`."""
        self.message = message


@dataclass(frozen=True)
class InjectedFault:
    """A fault that somebody injected on purpose: incidents count their seconds from `time` (unix)."""

    time: float
    slot: int | None
    description: str


@dataclass(frozen=True)
class Snapshot:
    """What the cluster holds of one job at one moment."""

    job: PretrainJob
    status: JobStatus
    """As last written: the only memory that outlives the operator."""
    pods: tuple[Pod, ...]
    faults: tuple[InjectedFault, ...] = ()
    stopping: bool = False
    """The user asked for the end (Ctrl-C locally, deletion on Kubernetes): checkpoint, then let all workers go."""
    profile: ProfileRequest | InvalidRequest | None = None
    """The newest request for a profile, answered or not."""
    invalid: str = ""
    """What is wrong with the spec as it stands; `job` is then the last one that was in order."""


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event, or a line of the run's log."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


class Cluster(Protocol):
    """One job's place in a cluster. Every call may raise OSError when the cluster does not answer: retry later."""

    async def snapshot(self) -> Snapshot:
        """The job, its last written status and its pods."""
        ...

    async def create_pod(self, slot: int, attempt: int, placement: Placement) -> None:
        """Start a worker under its deterministic identity; that it exists already is success. Raises Refused."""
        ...

    async def delete_pod(self, pod: Pod, grace_seconds: float) -> None:
        """End a worker: SIGTERM, then SIGKILL after the grace; 0: SIGKILL at once. That it is gone is success."""
        ...

    async def delete_job(self) -> None:
        """Remove the job itself with all that belongs to it; its time after the end is over. Gone is success."""
        ...

    async def write_status(self, status: JobStatus) -> None:
        """Replace the job's status."""
        ...

    async def emit(self, event: Event) -> None:
        """Tell people what happened."""
        ...

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Call `changed` whenever a later snapshot may differ."""
        ...
