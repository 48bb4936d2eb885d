"""When a generation is over: an ordered chain of rules over what was seen. The first verdict wins.

Lost contact is evidence, not a verdict: while steps advance every member is alive, because collectives need all of
them. If nobody at all is heard, the trouble is the coordinator's own, and nothing ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pretrain_api.messages.protocol import Member
from pretrain_operator.coordinator.settings import Settings
from pretrain_operator.facts.fact import Cause


@dataclass(frozen=True)
class Verdict:
    """Why a generation ends, and whose fault it was as far as known."""

    cause: Cause
    fault_time: float
    member: Member | None = None
    message: str = ""


@dataclass(frozen=True)
class Witness:
    """What is seen of one member."""

    member: Member
    gone: str
    """Not empty: its pod or its agent's place is certainly lost, and how."""
    heard_at: float
    lost_at: float | None
    """Since when it has no connection, or no ranks; None: all well."""


@dataclass(frozen=True)
class Scene:
    """All that the rules look at."""

    now: float
    witnesses: tuple[Witness, ...]
    stepped: bool
    """A step was done in this generation."""
    advanced_at: float
    active_at: float
    step_seconds: float
    silence: float
    """How long a healthy agent may say nothing, as learned."""
    quiet_until: float
    """No verdict from absence before: agents may be on their way back."""
    heard_at: float | None
    """When anybody who is connected was last heard."""
    hang_timeout: float
    verdict: Verdict | None
    suspicion: Verdict | None

    @property
    def blind(self) -> bool:
        """Nobody is heard, or people are just coming back: absence proves nothing."""
        return self.now < self.quiet_until or self.heard_at is None or self.now - self.heard_at > self.silence

    def still_lost(self, witness: Witness) -> bool:
        """It is away, and others were heard since: the trouble is not on this side."""
        return witness.lost_at is not None and self.heard_at is not None and self.heard_at > witness.lost_at


def judge(scene: Scene, settings: Settings) -> Verdict | None:
    """The reason for which the generation must end now, or None."""
    for rule in _RULES:
        verdict = rule(scene, settings)
        if verdict is not None:
            return verdict
    return None


def _pod_gone(scene: Scene, settings: Settings) -> Verdict | None:
    for witness in scene.witnesses:
        if witness.gone:
            fault_time = witness.heard_at if witness.lost_at is None else witness.lost_at
            return Verdict("WorkerLost", fault_time, witness.member, witness.gone)
    return None


def _reported(scene: Scene, settings: Settings) -> Verdict | None:
    return scene.verdict


def _collective_error(scene: Scene, settings: Settings) -> Verdict | None:
    suspicion = scene.suspicion
    if suspicion is None:
        return None
    for witness in scene.witnesses:
        if witness.lost_at is not None:
            return Verdict("WorkerLost", witness.lost_at, witness.member, f"its connection broke; {suspicion.message}")
    return suspicion if scene.now - suspicion.fault_time >= settings.collective_wait else None


def _connection_closed(scene: Scene, settings: Settings) -> Verdict | None:
    if scene.blind:
        return None
    unreported = any(witness.member.rank == 0 and witness.lost_at is not None for witness in scene.witnesses)
    patience = settings.closed_after_unreported if unreported else settings.closed_after
    paced = scene.stepped and scene.step_seconds > 0  # a new coordinator has yet to learn how long a step takes
    patience = max(patience, scene.step_seconds) if paced else settings.closed_after_starting
    for witness in scene.witnesses:
        if witness.lost_at is None or not scene.still_lost(witness):
            continue
        # A step that was under way when it died may still have been completed by the others.
        if scene.now - max(witness.lost_at, scene.advanced_at) >= patience:
            return Verdict("WorkerLost", witness.lost_at, witness.member, "its connection broke and steps stand still")
    return None


def _silent(scene: Scene, settings: Settings) -> Verdict | None:
    if scene.blind:
        return None
    patience, standstill = scene.silence, max(settings.standstill_after, 3 * scene.step_seconds)
    if not scene.stepped:
        patience, standstill = max(patience, settings.silence_after_starting), settings.standstill_after
    if scene.now - scene.advanced_at < standstill:
        return None
    quietest = min(scene.witnesses, key=lambda witness: witness.heard_at)
    if scene.now - quietest.heard_at < patience:
        return None
    return Verdict("WorkerSilent", quietest.heard_at, quietest.member, "it says nothing and steps stand still")


def _hang(scene: Scene, settings: Settings) -> Verdict | None:
    if scene.blind or scene.now - scene.active_at < scene.hang_timeout:
        return None
    return Verdict("Hang", scene.active_at, None, f"no step for {scene.now - scene.active_at:.0f} s")


_RULES: tuple[Callable[[Scene, Settings], Verdict | None], ...] = (
    _pod_gone,
    _reported,
    _collective_error,
    _connection_closed,
    _silent,
    _hang,
)
