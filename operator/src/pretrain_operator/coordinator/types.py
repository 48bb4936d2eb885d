"""The values that pass between coordinator, plan and ledger. Times are unix seconds from the injected clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from pretrain_api.messages.profile_request import ProfileRequest
from pretrain_api.messages.protocol import Generation
from pretrain_api.messages.reports import Failed, Finished


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
