"""What was seen of the current generation's members, gathered for the rules of liveness."""

from __future__ import annotations

from pretrain_api.messages.protocol import Hello, Member
from pretrain_operator.coordinator.members import Agent, Roster
from pretrain_operator.coordinator.running_generation import Pace, Running
from pretrain_operator.coordinator.settings import Settings
from pretrain_operator.coordinator.types import Want
from pretrain_operator.liveness.rules import Scene, Witness


class Attention:
    """Hears the agents, and knows when absence proves nothing because the trouble may be on this side."""

    def __init__(self, roster: Roster, settings: Settings) -> None:
        self._roster = roster
        self._settings = settings
        self._quiet_until = float("-inf")
        self.pace = Pace()

    def hear(self, now: float) -> None:
        """Somebody speaks. If nobody did for a while, the others may be on their way back as well."""
        last = self._last_heard()
        if self._roster.joined and (last is None or now - last > self._settings.silence_after):
            self._wait_for_others(now, self._settings.reconnect_grace)

    def meet(self, hello: Hello, now: float) -> None:
        """The first agent tells of a generation that this coordinator did not form. Who is missing from one that stands
        still is most likely the reason for it."""
        settings = self._settings
        self.pace.know_step(hello.step_seconds)
        still = max(settings.standstill_after, 3 * hello.step_seconds)
        stands = bool(hello.step_seconds) and hello.stepped_seconds is not None and hello.stepped_seconds >= still
        self._wait_for_others(now, settings.reconnect_grace_still if stands else settings.reconnect_grace)

    def _wait_for_others(self, now: float, seconds: float) -> None:
        """Nobody is called lost for a while: agents come back one by one, with back-off."""
        self._quiet_until = max(self._quiet_until, now + seconds)

    def learn_gap(self, agent: Agent, now: float) -> None:
        """An agent speaks after a gap. Long ones were no rhythm but an accident."""
        self.pace.learn_gap(now - agent.heard_at, at_most=self._settings.silence_at_most / 2)

    def scene(self, running: Running, want: Want, now: float) -> Scene:
        """All that the rules of liveness look at."""
        settings, step_seconds = self._settings, self.pace.step_seconds
        hang_timeout = want.hang_timeout or max(settings.hang_at_least, 20 * step_seconds)
        if not running.stepped or running.evaluating:
            hang_timeout = max(hang_timeout, settings.hang_apart_from_steps)
        if want.ranks_wait:
            hang_timeout = float("inf")
        return Scene(
            now=now,
            witnesses=tuple(self._witness(member, running, want) for member in running.generation.members),
            stepped=running.stepped,
            advanced_at=running.advanced_at,
            active_at=running.active_at,
            step_seconds=step_seconds,
            silence=min(max(settings.silence_after, 3 * self.pace.gap), settings.silence_at_most),
            quiet_until=self._quiet_until,
            heard_at=self._last_heard(),
            hang_timeout=hang_timeout,
            verdict=running.verdict,
            suspicion=running.suspicion,
        )

    def uneasy(self, running: Running) -> bool:
        """Something is undecided: look again soon."""
        members = (self._roster.find(member.agent_id) for member in running.generation.members)
        return running.suspicion is not None or any(agent is None or _lost_at(agent) is not None for agent in members)

    def _last_heard(self) -> float | None:
        return max((agent.heard_at for agent in self._roster.agents if agent.connected), default=None)

    def _witness(self, member: Member, running: Running, want: Want) -> Witness:
        agent = self._roster.find(member.agent_id)
        gone = ""
        if (member.slot, member.attempt) not in want.pods:
            gone = "its pod is gone"
        elif any(other.pod[0] == member.slot and other is not agent for other in self._roster.joined):
            gone = "another agent took its slot"
        if agent is None:
            # Adopted and not back at this coordinator yet, or let go because its pod is gone. A step takes all members.
            return Witness(member, gone, heard_at=running.advanced_at, lost_at=running.advanced_at)
        return Witness(member, gone, max(agent.heard_at, running.since), _lost_at(agent))


def _lost_at(agent: Agent) -> float | None:
    """Since when it has no connection, or no ranks; None: all well."""
    lost = [time for time in (agent.closed_at, agent.rankless_at, agent.final_at) if time is not None]
    return min(lost) if lost else None
