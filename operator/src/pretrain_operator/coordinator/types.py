"""Values exchanged between coordinator and plan. Times are unix seconds from the injected clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pretrain_api.messages.profile_request import ProfileRequest
from pretrain_api.messages.protocol import Generation
from pretrain_api.messages.reports import Failed, Finished, Progress, ReportBody, StepDone


@dataclass(frozen=True)
class Want:
    """The input that `plan` sets before every reconcile."""

    replicas: int
    min: int
    max: int
    replica_quantum: int = 1
    """Members per replica of the model: generations contain whole replicas, surplus agents wait."""
    shrink_after: float = 0.0
    """Seconds that survivors wait for a replacement before they resume without it."""
    running: bool = True
    """False: suspended, stopping or ended. The running generation takes a checkpoint and holds; none is formed."""
    formation_wait: float = 30.0
    """Seconds that the first generation waits for `replicas` members before it forms with at least `min`."""
    hang_timeout: float | None = None
    """Seconds without a step before all ranks restart; None: learned from the step times."""
    pods: frozenset[tuple[int, int]] = frozenset()
    """(slot, attempt) of live pods: only their agents may join, and a member without a live pod is lost."""
    ranks_wait: bool = False
    """The ranks reported that they wait for an external resource: a standstill is no hang."""
    profile: ProfileRequest | None = None
    """Open profile request; None: none, or answered."""
    remove_slots: frozenset[int] = frozenset()
    """Slots to drain (scale-down): excluded from the next generation, which forms at a step boundary."""


@dataclass(frozen=True)
class AgentView:
    """The coordinator's view of an agent."""

    agent_id: str
    slot: int
    attempt: int
    node: str
    connected: bool
    last_heard: float
    rank: int | None
    """Its rank in the current generation; None: no member."""
    step: int
    leaving: bool


@dataclass(frozen=True)
class CoordinatorView:
    """The coordinator's state at one moment."""

    highest_number: int
    current: Generation | None
    """The announced generation; None between two generations."""
    forming: bool
    """The next generation waits for members, its store or a hold."""
    holding: bool
    """The current ranks hold at a step boundary with a committed checkpoint."""
    agents: tuple[AgentView, ...]
    pids: dict[int, int] = field(default_factory=dict[int, int])
    """Global rank -> process id on its node, as reported by the current ranks."""
    finished: Finished | None = None
    """Rank 0 completed the last step and its checkpoint is committed."""
    fatal: Failed | None = None
    """A failure that no restart can fix."""


# --- facts, in the order in which they happened; the ledger makes status, incidents and goodput of them ---------------


Cause = Literal[
    "WorkerLost", "WorkerSilent", "RankFailed", "WorkerLeft", "Hang", "Resized", "WorkerJoined",
    "CheckpointRejected", "NumberTaken", "Suspended", "Disagreement",
]  # fmt: skip
INTENDED: tuple[Cause, ...] = ("Resized", "WorkerJoined", "WorkerLeft", "Suspended")
"""Ends on purpose, at a step boundary, with a checkpoint."""


@dataclass(frozen=True)
class Ended:
    """A generation ended and not because the job finished."""

    time: float
    number: int
    cause: Cause
    step: int
    """Steps done, as far as reported."""
    fault_time: float
    """The last sign of life of what failed; equal to `time` for an intended end."""
    slot: int | None = None
    node: str = ""
    message: str = ""

    @property
    def intended(self) -> bool:
        """At a step boundary, with a checkpoint: no incident."""
        return self.cause in INTENDED


@dataclass(frozen=True)
class Announced:
    """A generation went out to all its members."""

    time: float
    generation: Generation


@dataclass(frozen=True)
class Reported:
    """A report of the current generation, each exactly once for each sequence number."""

    time: float
    """When the agent received it from the rank."""
    generation: int
    slot: int
    body: ReportBody


Fact = Ended | Announced | Reported


def is_step(body: ReportBody) -> bool:
    """A step was done, which calls for nothing at once: in a job that trains most reports are of this kind."""
    return isinstance(body, StepDone | Progress)
