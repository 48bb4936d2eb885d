"""The coordinator's evidence of liveness: collected from roster and current generation, judged by the rules."""

from __future__ import annotations

from pretrain_api.messages.protocol import Hello, Member
from pretrain_operator.coordinator.members import Agent, Roster
from pretrain_operator.coordinator.running_generation import RunningGeneration
from pretrain_operator.coordinator.types import Want
from pretrain_operator.liveness.rules import GenerationEvidence, GenerationVerdict, MemberEvidence, judge
from pretrain_operator.liveness.silence import SilenceClock
from pretrain_operator.liveness.timings import LearnedTimings, Timings


class LivenessMonitor:
    """Tracks when agents are heard and decides whether the current generation must end."""

    def __init__(self, roster: Roster, timings: Timings) -> None:
        self._roster = roster
        self._timings = timings
        self._clock = SilenceClock()
        self._learned = LearnedTimings()

    def heard(self, now: float) -> None:
        """Record a message of any agent. After total silence the other agents get time to reconnect."""
        clock = self._clock.hearing(self._last_heard())
        if self._roster.joined and not clock.hears(now, self._timings.silence_after):
            self._clock = self._clock.with_grace(now + self._timings.reconnect_grace)

    def adopted(self, hello: Hello, now: float) -> None:
        """Give agents time to reconnect after the first hello of a generation that another coordinator formed.

        The wait is shorter while its steps stall: then a missing member is most likely the cause.
        """
        timings = self._timings
        self._learned.seed_step(hello.step_seconds)
        standstill = max(timings.standstill_after, 3 * hello.step_seconds)
        stalls = bool(hello.step_seconds) and hello.stepped_seconds is not None and hello.stepped_seconds >= standstill
        grace = timings.reconnect_grace_still if stalls else timings.reconnect_grace
        self._clock = self._clock.with_grace(now + grace)

    def learn_gap(self, agent: Agent, now: float) -> None:
        """Learn the gap before the agent's present message; long gaps are outages and are ignored."""
        self._learned.learn_gap(now - agent.heard_at, at_most=self._timings.silence_at_most / 2)

    def learn_step(self, seconds: float) -> None:
        """Learn the duration of a step."""
        self._learned.learn_step(seconds)

    def verdict(self, running: RunningGeneration, want: Want, now: float) -> GenerationVerdict | None:
        """Return why the generation must end, or None."""
        return judge(self._evidence(running, want, now), self._timings)

    def unresolved(self, running: RunningGeneration) -> bool:
        """Return whether a disconnect or a collective error is unresolved, so that a verdict may be due soon."""
        members = (self._roster.find(member.agent_id) for member in running.generation.members)
        return running.suspicion is not None or any(agent is None or _lost_at(agent) is not None for agent in members)

    def _evidence(self, running: RunningGeneration, want: Want, now: float) -> GenerationEvidence:
        timings = self._timings
        return GenerationEvidence(
            now=now,
            members=tuple(self._member(member, running, want) for member in running.generation.members),
            stepped=running.stepped,
            advanced_at=running.advanced_at,
            active_at=running.active_at,
            step_seconds=self._learned.step_seconds,
            silence=min(max(timings.silence_after, 3 * self._learned.gap), timings.silence_at_most),
            clock=self._clock.hearing(self._last_heard()),
            hang_timeout=self._hang_timeout(running, want),
            verdict=running.verdict,
            suspicion=running.suspicion,
        )

    def _hang_timeout(self, running: RunningGeneration, want: Want) -> float:
        if want.ranks_wait:
            return float("inf")
        timeout = want.hang_timeout or max(self._timings.hang_at_least, 20 * self._learned.step_seconds)
        if not running.stepped or running.evaluating:
            return max(timeout, self._timings.hang_apart_from_steps)
        return timeout

    def _last_heard(self) -> float | None:
        return max((agent.heard_at for agent in self._roster.agents if agent.connected), default=None)

    def _member(self, member: Member, running: RunningGeneration, want: Want) -> MemberEvidence:
        agent = self._roster.find(member.agent_id)
        gone = ""
        if (member.slot, member.attempt) not in want.pods:
            gone = "its pod is gone"
        elif any(other.pod[0] == member.slot and other is not agent for other in self._roster.joined):
            gone = "another agent took its slot"
        if agent is None:
            # Adopted and not reconnected yet, or removed with its pod. The last step is proof of all members' life.
            return MemberEvidence(member, gone, heard_at=running.advanced_at, lost_at=running.advanced_at)
        return MemberEvidence(member, gone, max(agent.heard_at, running.since), _lost_at(agent))


def _lost_at(agent: Agent) -> float | None:
    """Start of the time without a connection or without ranks; None: healthy."""
    lost = [time for time in (agent.closed_at, agent.rankless_at, agent.final_at) if time is not None]
    return min(lost) if lost else None
