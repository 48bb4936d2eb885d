"""The clock of silence: how much of an agent's silence proves anything about the agent.

Two observers use it: the coordinator, which hears agents directly, and `decide`, which sees when the coordinator last
heard them. Both first ask whether a silence is the observer's own fault. It is while no agent at all is heard, while
agents reconnect after such an outage, and for the time in which the observer itself was stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

NEVER = float("-inf")


@dataclass(frozen=True)
class SilenceClock:
    """Evidence about the observer's own health. Times are unix seconds."""

    healthy_since: float = NEVER
    """Start of the observer's current uninterrupted operation."""
    grace_until: float = NEVER
    """End of the grace period in which agents reconnect."""
    heard_at: float | None = None
    """Last message of any agent; None: no agent is connected."""

    def interrupted(self, now: float) -> SilenceClock:
        """Record an interruption of the observer that ends now."""
        return replace(self, healthy_since=now)

    def overslept(self, due: float, now: float, late_after: float) -> SilenceClock:
        """Record a wake-up that was due earlier: a late one is an interruption."""
        return self.interrupted(now) if now > due + late_after else self

    def with_grace(self, until: float) -> SilenceClock:
        """Extend the grace period for reconnecting agents."""
        return replace(self, grace_until=max(self.grace_until, until))

    def hearing(self, heard_at: float | None) -> SilenceClock:
        """Set the time of the last message of any agent."""
        return replace(self, heard_at=heard_at)

    def hears(self, now: float, allowance: float) -> bool:
        """Return whether any agent was heard within the allowance."""
        return self.heard_at is not None and now - self.heard_at <= allowance

    def is_own_fault(self, now: float, allowance: float) -> bool:
        """Return whether absence proves nothing: no agent is heard, or agents are reconnecting."""
        return now < self.grace_until or not self.hears(now, allowance)

    def outlasted(self, lost_at: float) -> bool:
        """Return whether another agent was heard after this one was lost, so that the outage is not the observer's."""
        return self.heard_at is not None and self.heard_at > lost_at

    def silence(self, last_heard: float, now: float, allowance: float) -> float:
        """Seconds since the agent was heard; 0 while the silence is the observer's own fault."""
        return 0.0 if self.is_own_fault(now, allowance) else max(0.0, now - last_heard)

    def absence(self, last_heard: float, now: float) -> float:
        """Seconds since the agent was heard, as far as the observer was healthy, whoever else is heard."""
        return max(0.0, now - max(last_heard, self.healthy_since))
