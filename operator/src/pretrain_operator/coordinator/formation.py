"""Formation of the next generation: choose its members, wait for enough of them, set up its store."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from pretrain_api.messages import protocol
from pretrain_api.messages.protocol import Generation
from pretrain_api.spec.replicas import round_down
from pretrain_operator.coordinator.lineage_state import LineageState
from pretrain_operator.coordinator.members import Agent, Roster
from pretrain_operator.coordinator.output import OutputBuffer
from pretrain_operator.coordinator.types import Want
from pretrain_operator.liveness.timings import Timings


@dataclass(frozen=True)
class GenerationGap:
    """The time between two generations."""

    reason: str
    """Reason of the next generation: the cause of the last one's end, `Started`, or `Resumed`."""
    since: float
    survivors: tuple[str, ...] = ()
    """Agent ids of the ended generation, by rank."""
    fault: bool = False
    """The generation ended by a fault; members may be missing."""

    @property
    def starting(self) -> bool:
        """No generation ended just before: the next one is the first, or the first after a suspension."""
        return not self.survivors


@dataclass(frozen=True)
class PendingGeneration:
    """A generation whose store is being set up."""

    number: int
    members: tuple[str, ...]
    """Agent ids by rank; the first one hosts the store."""
    asked_at: float
    retried: bool
    """An earlier formation failed: ranks of the old generation are stopped now."""
    port: int | None = None
    """Port of the store; None: it does not listen yet."""


def choose(agents: Iterable[Agent], want: Want, order: Collection[str]) -> tuple[Agent, ...]:
    """Choose the members of a generation by rank: survivors in their old order, then newcomers by slot, up to the size.

    Agents that failed to host a store come last, since rank 0 hosts it.
    """
    ranks = {agent_id: rank for rank, agent_id in enumerate(order)}

    def place(agent: Agent) -> tuple[int, int, int]:
        return (agent.failed_hosts, ranks.get(agent.id, len(ranks)), agent.hello.slot)

    fit = [agent for agent in agents if agent.hello.slot not in want.remove_slots]
    newcomers_last = sorted(fit, key=lambda agent: (ranks.get(agent.id, len(ranks)), agent.hello.slot))
    size = round_down(min(len(fit), want.replicas), want.replica_quantum)
    return tuple(sorted(newcomers_last[:size], key=place))


def ready(
    chosen: tuple[Agent, ...], want: Want, gap: GenerationGap, enough_since: float, now: float, timings: Timings
) -> bool:
    """Return whether these members form a generation now. `enough_since`: since when there are at least `min`."""
    if len(chosen) >= want.replicas:
        return True
    if gap.starting:
        return now >= enough_since + want.formation_wait
    if not gap.fault or len(chosen) >= len(gap.survivors):
        return True
    survivors = sum(agent.id in gap.survivors for agent in chosen)
    settled = survivors >= want.min or now >= enough_since + timings.settle
    return settled and now >= gap.since + want.shrink_after


class Formation:
    """Forms one generation at a time out of the roster's available agents."""

    def __init__(
        self, job_uid: str, roster: Roster, lineage: LineageState, outbox: OutputBuffer, timings: Timings
    ) -> None:
        self._job_uid = job_uid
        self._roster = roster
        self._lineage = lineage
        self._outbox = outbox
        self._timings = timings
        self._enough_since: float | None = None
        self._agents_return_until: float | None = None
        self.gap = GenerationGap("Started", 0.0)
        self.pending: PendingGeneration | None = None
        self.adoptable = True
        """No generation was formed or ended here: one that agents report is adopted as it runs."""

    def started(self, now: float) -> None:
        """Start the wait for agents to reconnect to this coordinator, once."""
        if self._agents_return_until is None:
            self._agents_return_until = now + self._timings.fresh_wait

    def resumed(self, now: float) -> None:
        """Begin again after a suspension."""
        self.gap = GenerationGap("Resumed", now)
        self._enough_since = None

    def generation_ended(self, generation: Generation, reason: str, now: float, *, fault: bool) -> None:
        """Begin the gap after a generation."""
        survivors = tuple(member.agent_id for member in generation.members)
        self.gap = GenerationGap(reason, now, survivors, fault=fault)
        self.adoptable = False
        self._enough_since = None

    def abandon(self) -> None:
        """Form and adopt nothing any more: the job is over."""
        self.pending, self.adoptable = None, False

    def store_ready(self, agent: Agent, message: protocol.StoreReady) -> None:
        """Record that the host's store listens."""
        pending = self.pending
        if pending is not None and (pending.number, pending.members[0]) == (message.number, agent.id):
            self.pending = replace(pending, port=message.port)

    def repeat_host_request(self, agent: Agent) -> None:
        """Ask a reconnected host again: the request or its answer may be lost with the old connection."""
        pending = self.pending
        if pending is not None and agent.id == pending.members[0] and pending.port is None:
            self._outbox.send_to(agent, protocol.HostStore(number=pending.number))

    def advance(self, want: Want, now: float, *, idle: bool) -> Generation | None:
        """Take the next step of a formation; returns the generation once its store listens.

        `idle`: no generation runs and a next one is wanted.
        """
        available = tuple(agent for agent in self._roster.joined if agent.available and self._recent(agent, now))
        chosen = choose(available, want, self.gap.survivors)
        self._note_size(chosen, want, now)
        if not idle:
            self.pending = None
            return None
        failed = self.pending
        if failed is not None:
            if not self._has_failed(failed, available, want, now):
                return self._complete(failed, failed.port) if failed.port is not None else None
            self.pending = None
            chosen = choose(available, want, self.gap.survivors)
        if self._enough_since is None or self._agents_may_return(want, now):
            return None
        if ready(chosen, want, self.gap, self._enough_since, now, self._timings):
            self._request_host(chosen, now, retried=failed is not None)
        return None

    def _note_size(self, chosen: tuple[Agent, ...], want: Want, now: float) -> None:
        if not chosen or len(chosen) < want.min:
            self._enough_since = None
        elif self._enough_since is None:
            self._enough_since = now

    def _request_host(self, chosen: tuple[Agent, ...], now: float, *, retried: bool) -> None:
        number = self._lineage.next_number()
        self.pending = PendingGeneration(number, tuple(agent.id for agent in chosen), now, retried)
        self._outbox.send_to(chosen[0], protocol.HostStore(number=number))

    def _has_failed(self, pending: PendingGeneration, available: tuple[Agent, ...], want: Want, now: float) -> bool:
        """Return whether the formation must start over: a member left, the size changed, or the store is late."""
        fit = {agent.id for agent in available if agent.hello.slot not in want.remove_slots}
        if not fit.issuperset(pending.members) or not want.min <= len(pending.members) <= want.replicas:
            return True
        if pending.port is not None:
            return False
        late = now - pending.asked_at >= self._timings.store_timeout
        host = self._roster.find(pending.members[0])
        if late and host is not None:
            host.failed_hosts += 1
        return late

    def _complete(self, pending: PendingGeneration, port: int) -> Generation:
        agents = [agent for agent_id in pending.members if (agent := self._roster.find(agent_id)) is not None]
        for agent in agents:
            agent.failed_hosts = 0
        self.pending, self.adoptable = None, False
        return Generation(
            number=pending.number,
            job_uid=self._job_uid,
            members=tuple(agent.as_member(rank) for rank, agent in enumerate(agents)),
            store_host=agents[0].hello.host,
            store_port=port,
            reason=self.gap.reason,
            rejected=self._lineage.rejected,
            may_take_over=not self._lineage.owned,
        )

    def _recent(self, agent: Agent, now: float) -> bool:
        return now - agent.heard_at <= self._timings.silence_after_starting

    def _agents_may_return(self, want: Want, now: float) -> bool:
        """Return whether a new coordinator still waits: it could destroy a running generation it has not heard of."""
        until = self._agents_return_until
        if not self.adoptable or until is None or now >= until:
            return False
        return not want.pods.issubset(agent.pod for agent in self._roster.joined if agent.connected)
