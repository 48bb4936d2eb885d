"""Who makes the next generation, and when it may be formed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from pretrain_api.spec.replicas import down_to_unit
from pretrain_operator.coordinator.members import Agent
from pretrain_operator.coordinator.settings import Settings
from pretrain_operator.coordinator.types import Want


@dataclass(frozen=True)
class Interval:
    """The time between two generations."""

    reason: str
    """Why the next one is formed: the cause of the last one's end, `Started`, or `Resumed`."""
    since: float
    survivors: tuple[str, ...] = ()
    """Agent ids of the generation that ended, by rank."""
    fault: bool = False
    """It ended by a fault; members may be missing."""

    @property
    def starting(self) -> bool:
        """No generation ended just before: the first one, or the first after a suspension."""
        return not self.survivors


@dataclass(frozen=True)
class Forming:
    """A generation whose store is being set up."""

    number: int
    members: tuple[str, ...]
    """Agent ids by rank; the first one hosts the store."""
    asked_at: float
    again: bool
    """An attempt before this one failed: the old ranks are not left running any longer."""
    port: int | None = None
    """Where the store listens; None: not said yet."""


def choose(agents: Iterable[Agent], want: Want, order: Collection[str]) -> tuple[Agent, ...]:
    """The members of a generation by rank: survivors in their old order, then newcomers by slot; as many as fit.

    Agents that failed to host a store come last, whatever they were, since rank 0 hosts it.
    """
    ranks = {agent_id: rank for rank, agent_id in enumerate(order)}

    def place(agent: Agent) -> tuple[int, int, int]:
        return (agent.failed_hosts, ranks.get(agent.id, len(ranks)), agent.hello.slot)

    fit = [agent for agent in agents if agent.hello.slot not in want.remove_slots]
    newcomers_last = sorted(fit, key=lambda agent: (ranks.get(agent.id, len(ranks)), agent.hello.slot))
    size = down_to_unit(min(len(fit), want.replicas), want.unit)
    return tuple(sorted(newcomers_last[:size], key=place))


def ready(
    chosen: tuple[Agent, ...], want: Want, interval: Interval, enough_since: float, now: float, settings: Settings
) -> bool:
    """Whether these, `min` or more, form a generation now. `enough_since`: since when there are `min` of them."""
    if len(chosen) >= want.replicas:
        return True
    if interval.starting:
        return now >= enough_since + want.formation_wait
    if not interval.fault or len(chosen) >= len(interval.survivors):
        return True
    survivors = sum(agent.id in interval.survivors for agent in chosen)
    settled = survivors >= want.min or now >= enough_since + settings.settle
    return settled and now >= interval.since + want.shrink_after
