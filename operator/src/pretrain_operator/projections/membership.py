"""Generations of a run: the members of the current one, and a summary of each that trained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pretrain_api.messages.protocol import Generation
from pretrain_api.status.job import GenerationSummary

MAX_GENERATIONS = 200
"""Summaries kept in the status, the newest ones."""


@dataclass(frozen=True)
class Membership:
    """Slice of the status: generations."""

    highest: int = 0
    """Highest generation number known."""
    summaries: tuple[GenerationSummary, ...] = ()
    current: Generation | None = None
    """Generation announced or adopted last by this process."""
    started: dict[int, float] = field(default_factory=dict[int, float])
    """Global rank -> unix seconds at which its process reported in, in the current generation."""

    def knows(self, number: int) -> bool:
        """Tell whether the members of this generation are known."""
        return self.current is not None and self.current.number == number

    def workers(self, number: int) -> int:
        """Return the number of members of a generation; 0 if unknown."""
        if self.current is not None and self.current.number == number:
            return len(self.current.members)
        return next((item.workers for item in self.summaries if item.number == number), 0)

    def devices(self, number: int) -> int | None:
        """Return the number of training processes of a generation; None if its members are unknown."""
        return self.current.world_size if self.current is not None and self.current.number == number else None

    def node_of(self, number: int, slot: int) -> str:
        """Return the node of a worker of this generation; empty if unknown."""
        members = self.current.members if self.current is not None and self.current.number == number else ()
        return next((member.node for member in members if member.slot == slot), "")

    def with_started(self, rank: int, time: float) -> Membership:
        """Add a rank of the current generation that runs."""
        return self if rank in self.started else replace(self, started={**self.started, rank: time})

    @property
    def all_started_at(self) -> float | None:
        """Unix seconds at which the last rank of the current generation started; None while some are missing."""
        if self.current is None or len(self.started) < self.current.world_size:
            return None
        return max(self.started.values(), default=None)

    def with_current(self, generation: Generation) -> Membership:
        """Replace the current generation."""
        return replace(self, highest=max(self.highest, generation.number), current=generation, started={})

    def with_summary(self, summary: GenerationSummary) -> Membership:
        """Add a generation that trains."""
        highest = max(self.highest, summary.number)
        return replace(self, highest=highest, summaries=(*self.summaries, summary)[-MAX_GENERATIONS:])
