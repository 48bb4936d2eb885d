"""Port to the system that runs the workers: Kubernetes, or local processes. `plan` cannot tell them apart."""

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
    """A worker, identified by (slot, attempt): a pod on Kubernetes, a process group on one machine."""

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
    """Cause of the end (`OOMKilled`, `Evicted`, `Error`, …), or of a pending pod the obstacle (`Unschedulable`,
    `ImagePullBackOff`, `CreateContainerConfigError`, …), empty if there is none."""
    message: str = ""
    node_ready: bool | None = None
    """Readiness of its node; None if the cluster reports none or nodes cannot be read."""

    @property
    def alive(self) -> bool:
        """Its processes may still run."""
        return self.phase in ("Pending", "Running")


@dataclass(frozen=True)
class Placement:
    """Nodes for a new pod, and its termination grace period."""

    never: frozenset[str] = frozenset()
    """Excluded nodes: nothing there answers."""
    rather_not: frozenset[str] = frozenset()
    """Nodes to avoid if there are others."""
    grace_seconds: float = 30.0
    """From SIGTERM to SIGKILL: time for a checkpoint."""


class PodRefused(OSError):
    """The cluster refuses a pod until somebody fixes the cause: quota, admission, permissions."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        """CamelCase, for conditions: `QuotaExceeded`, `Forbidden`, `Invalid`."""
        self.message = message


@dataclass(frozen=True)
class InjectedFault:
    """A fault injected on purpose: its incident counts seconds from `time` (unix)."""

    time: float
    slot: int | None
    description: str


@dataclass(frozen=True)
class Snapshot:
    """State of one job in the cluster at one moment."""

    job: PretrainJob
    status: JobStatus
    """Status as last written: the only memory that outlives the operator."""
    pods: tuple[Pod, ...]
    faults: tuple[InjectedFault, ...] = ()
    stopping: bool = False
    """The user asked for the end (Ctrl-C locally, deletion on Kubernetes): checkpoint, then end all workers."""
    profile: ProfileRequest | InvalidRequest | None = None
    """Newest request for a profile, answered or not."""
    invalid: str = ""
    """Error of the present spec; `job` then has the last valid one."""


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event, or a line of the run's log."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


class Cluster(Protocol):
    """One job in a cluster. Every call may raise OSError if the cluster does not answer: retry later."""

    async def snapshot(self) -> Snapshot:
        """Return the job, its last written status and its pods."""
        ...

    async def create_pod(self, slot: int, attempt: int, placement: Placement) -> None:
        """Start a worker under its deterministic identity; an existing one is a success. Raises PodRefused."""
        ...

    async def delete_pod(self, pod: Pod, grace_seconds: float) -> None:
        """End a worker: SIGTERM, then SIGKILL after the grace; 0: SIGKILL at once. A missing worker is a success."""
        ...

    async def delete_job(self) -> None:
        """Delete the job and everything that belongs to it. A missing job is a success."""
        ...

    async def write_status(self, status: JobStatus) -> None:
        """Replace the job's status."""
        ...

    async def emit(self, event: Event) -> None:
        """Publish an event."""
        ...

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Call `changed` whenever a later snapshot may differ."""
        ...
