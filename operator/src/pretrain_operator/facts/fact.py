"""Facts of a run, as values. Times are unix seconds of the process that noticed.

| source | facts |
|---|---|
| agents, through the coordinator | `Reported` |
| the coordinator | `GenerationAnnounced`, `GenerationEnded` |
| the job's service, of generations, pods and nodes that it observes | the others |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pretrain_api.messages.protocol import Generation
from pretrain_api.messages.reports import Progress, ReportBody, StepDone
from pretrain_api.status.job import NodeFailure
from pretrain_operator.cluster import InjectedFault

Cause = Literal[
    "WorkerLost", "WorkerSilent", "RankFailed", "WorkerLeft", "Hang", "Resized", "WorkerJoined",
    "CheckpointRejected", "NumberTaken", "Suspended", "Disagreement",
]  # fmt: skip
INTENDED: tuple[Cause, ...] = ("Resized", "WorkerJoined", "WorkerLeft", "Suspended")
"""Planned ends, at a step boundary and with a checkpoint."""


@dataclass(frozen=True)
class Reported:
    """A report of a rank of the current generation. The coordinator passes on each sequence number once."""

    time: float
    """When the agent received it from the rank."""
    generation: int
    slot: int
    body: ReportBody


@dataclass(frozen=True)
class GenerationAnnounced:
    """A generation was announced to all its members."""

    time: float
    generation: Generation


@dataclass(frozen=True)
class GenerationEnded:
    """A generation ended before the job finished."""

    time: float
    number: int
    cause: Cause
    step: int
    """Completed steps, as reported."""
    fault_time: float
    """Last sign of life of the failed member; equal to `time` for a planned end."""
    slot: int | None = None
    node: str = ""
    message: str = ""

    @property
    def intended(self) -> bool:
        """Planned: no incident."""
        return self.cause in INTENDED


@dataclass(frozen=True)
class GenerationAdopted:
    """A running generation was found that this process did not see announced."""

    time: float
    generation: Generation


@dataclass(frozen=True)
class PodsObserved:
    """State of the job's pods and of its suspension at one moment."""

    time: float
    running: bool
    """At least one pod runs."""
    suspended: bool


@dataclass(frozen=True)
class FaultsInjected:
    """All faults injected on purpose so far."""

    time: float
    faults: tuple[InjectedFault, ...]


@dataclass(frozen=True)
class NodesObserved:
    """Evidence against nodes: workers that crashed there, and nodes from which no agent is heard."""

    time: float
    crashes: tuple[tuple[str, NodeFailure], ...]
    silent: frozenset[str]


@dataclass(frozen=True)
class StartsFailed:
    """Pods ended before their agents joined."""

    time: float
    count: int
    message: str


@dataclass(frozen=True)
class ProfileRefused:
    """A request for a profile cannot be carried out."""

    time: float
    request: str
    message: str


@dataclass(frozen=True)
class JobEnded:
    """The job succeeded or failed: later reports and generations do not count."""

    time: float
    failed: bool


CoordinatorFact = GenerationEnded | GenerationAnnounced | Reported
ServiceFact = (
    GenerationAdopted | PodsObserved | FaultsInjected | NodesObserved | StartsFailed | ProfileRefused | JobEnded
)
Fact = CoordinatorFact | ServiceFact


def is_step(body: ReportBody) -> bool:
    """Tell reports of completed steps, most of a training job's, from those that call for action at once."""
    return isinstance(body, StepDone | Progress)
