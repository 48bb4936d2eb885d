"""Values exchanged between coordinator and plan. Times are unix seconds from the injected clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from pretrain_api.messages.profile_request import ProfileRequest
from pretrain_api.messages.protocol import Generation
from pretrain_api.messages.reports import Failed, Finished


@dataclass(frozen=True)
class Want:
    """The input that `plan` sets before every reconcile."""

    replicas: int
    min: int
    max: int
    processes: int | None = None
    """Training processes of each worker; None accepts any number."""
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
