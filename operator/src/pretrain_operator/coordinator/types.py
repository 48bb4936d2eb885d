"""The values that pass between coordinator, plan and ledger. Times are unix seconds from the injected clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pretrain_api.messages.profile_request import ProfileRequest
from pretrain_api.messages.protocol import Generation
from pretrain_api.messages.reports import Failed, Finished, Progress, ReportBody, StepDone


@dataclass(frozen=True)
class Want:
    """What `plan` asks of the coordinator; set before every round."""

    replicas: int
    min: int
    max: int
    unit: int = 1
    """A generation has a multiple of so many members, whole replicas of the model; agents beyond that wait."""
    shrink_after: float = 0.0
    """Seconds that the survivors wait for a replacement before they go on without it."""
    running: bool = True
    """False: suspended, stopping or ended. A running generation takes a checkpoint and holds; none is formed."""
    formation_wait: float = 30.0
    """Seconds that the first generation waits for `replicas` members before it is formed with at least `min`."""
    hang_timeout: float | None = None
    """Seconds without a step after which all ranks are restarted; None: learned from the step times."""
    pods: frozenset[tuple[int, int]] = frozenset()
    """(slot, attempt) of the pods that exist and live: only these may join; a member that is not here is gone."""
    ranks_wait: bool = False
    """The ranks said that they wait for something outside: that no step is done is no hang."""
    profile: ProfileRequest | None = None
    """What the ranks are asked to record; None: nothing, or it was done."""
    remove_slots: frozenset[int] = frozenset()
    """Slots to be let go gracefully (scale-down): excluded from the next generation, formed at a step boundary."""


@dataclass(frozen=True)
class AgentView:
    """An agent as the coordinator sees it."""

    agent_id: str
    slot: int
    attempt: int
    node: str
    connected: bool
    last_heard: float
    rank: int | None
    """Its place in the current generation."""
    step: int
    leaving: bool


@dataclass(frozen=True)
class CoordinatorView:
    """The coordinator at one moment, for `plan` and the ledger."""

    highest_number: int
    current: Generation | None
    """The generation announced to its members, or None between two."""
    forming: bool
    """A next generation waits for members, its store or a hold."""
    holding: bool
    """The ranks of the current generation hold at a step boundary with a checkpoint in force."""
    agents: tuple[AgentView, ...]
    pids: dict[int, int] = field(default_factory=dict[int, int])
    """Global rank -> process id on its node, as the current generation's ranks said."""
    finished: Finished | None = None
    """Rank 0 did the last step and its checkpoint is in force."""
    fatal: Failed | None = None
    """A failure that no restart can mend."""


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
