"""The rules that end a generation: an ordered chain over the evidence. The first verdict wins.

Lost contact is evidence, not a verdict: while steps advance every member is alive, because collectives need all of
them. When no agent at all is heard, the outage is the coordinator's own and no generation ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pretrain_api.messages.protocol import Member
from pretrain_operator.facts.fact import Cause
from pretrain_operator.liveness.silence import SilenceClock
from pretrain_operator.liveness.timings import Timings


@dataclass(frozen=True)
class GenerationVerdict:
    """The cause of a generation's end and the member at fault, as far as known."""

    cause: Cause
    fault_time: float
    member: Member | None = None
    message: str = ""


@dataclass(frozen=True)
class MemberEvidence:
    """The evidence about one member."""

    member: Member
    gone: str
    """Proof that its pod or its slot is lost; empty: none."""
    heard_at: float
    lost_at: float | None
    """Start of its disconnect, or of the time without ranks; None: healthy."""


@dataclass(frozen=True)
class GenerationEvidence:
    """The input of the rules."""

    now: float
    members: tuple[MemberEvidence, ...]
    stepped: bool
    """This generation completed a step."""
    advanced_at: float
    active_at: float
    step_seconds: float
    silence: float
    """Learned silence allowance of a healthy agent in seconds."""
    clock: SilenceClock
    hang_timeout: float
    verdict: GenerationVerdict | None
    """The verdict that the ranks' own reports prove."""
    suspicion: GenerationVerdict | None
    """The first collective error."""

    @property
    def blind(self) -> bool:
        """Absence proves nothing now."""
        return self.clock.is_own_fault(self.now, self.silence)


Rule = Callable[[GenerationEvidence, Timings], GenerationVerdict | None]


def judge(evidence: GenerationEvidence, timings: Timings) -> GenerationVerdict | None:
    """Return the verdict of the first matching rule, or None while the generation lives."""
    return next((verdict for rule in RULES if (verdict := rule(evidence, timings)) is not None), None)


def pod_gone(evidence: GenerationEvidence, _timings: Timings) -> GenerationVerdict | None:
    """End when a member's pod is gone or another agent took its slot."""
    for seen in evidence.members:
        if seen.gone:
            fault_time = seen.heard_at if seen.lost_at is None else seen.lost_at
            return GenerationVerdict("WorkerLost", fault_time, seen.member, seen.gone)
    return None


def reported(evidence: GenerationEvidence, _timings: Timings) -> GenerationVerdict | None:
    """End when a rank reported its own failure."""
    return evidence.verdict


def collective_error(evidence: GenerationEvidence, timings: Timings) -> GenerationVerdict | None:
    """Blame a disconnected member for a failed collective; without one, end with the error after a short wait."""
    suspicion = evidence.suspicion
    if suspicion is None:
        return None
    for seen in evidence.members:
        if seen.lost_at is not None:
            message = f"its connection broke; {suspicion.message}"
            return GenerationVerdict("WorkerLost", seen.lost_at, seen.member, message)
    return suspicion if evidence.now - suspicion.fault_time >= timings.collective_wait else None


def connection_closed(evidence: GenerationEvidence, timings: Timings) -> GenerationVerdict | None:
    """End when a member is disconnected and steps stall."""
    if evidence.blind:
        return None
    unreported = any(seen.member.rank == 0 and seen.lost_at is not None for seen in evidence.members)
    allowance = timings.closed_after_unreported if unreported else timings.closed_after
    paced = evidence.stepped and evidence.step_seconds > 0  # a new coordinator has yet to learn the step time
    allowance = max(allowance, evidence.step_seconds) if paced else timings.closed_after_starting
    for seen in evidence.members:
        if seen.lost_at is None or not evidence.clock.outlasted(seen.lost_at):
            continue
        # Survivors may still have completed the step that was under way at the disconnect.
        if evidence.now - max(seen.lost_at, evidence.advanced_at) >= allowance:
            message = "its connection broke and steps stall"
            return GenerationVerdict("WorkerLost", seen.lost_at, seen.member, message)
    return None


def silent(evidence: GenerationEvidence, timings: Timings) -> GenerationVerdict | None:
    """End when a connected member is silent and steps stall."""
    if evidence.blind:
        return None
    allowance, standstill = evidence.silence, max(timings.standstill_after, 3 * evidence.step_seconds)
    if not evidence.stepped:
        allowance, standstill = max(allowance, timings.silence_after_starting), timings.standstill_after
    if evidence.now - evidence.advanced_at < standstill:
        return None
    quietest = min(evidence.members, key=lambda seen: seen.heard_at)
    if evidence.now - quietest.heard_at < allowance:
        return None
    return GenerationVerdict("WorkerSilent", quietest.heard_at, quietest.member, "it is silent and steps stall")


def hang(evidence: GenerationEvidence, _timings: Timings) -> GenerationVerdict | None:
    """End when members are heard but no rank advances."""
    idle = evidence.now - evidence.active_at
    if evidence.blind or idle < evidence.hang_timeout:
        return None
    return GenerationVerdict("Hang", evidence.active_at, None, f"no step for {idle:.0f} s")


RULES: tuple[Rule, ...] = (pod_gone, reported, collective_error, connection_closed, silent, hang)
