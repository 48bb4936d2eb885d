"""Order and de-duplication of a run's facts: each occurrence is admitted once, whichever ranks report it.

Agents number their reports, and a coordinator passes each number on once. Two kinds of repetition remain: every rank
reports a rollback, a hold or a rejected checkpoint, and agents replay unacknowledged reports to a new operator, whose
status may include them already. Both are recognised here against a `LineagePosition`, which the status seeds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pretrain_api.checkpoint.lineage import parse_manifest_key
from pretrain_api.messages.reports import (
    CheckpointRejected,
    Diverged,
    Finished,
    Held,
    Profiled,
    ProfileFailed,
    Restored,
    Resumed,
    RolledBack,
    Saved,
    StepDone,
)
from pretrain_api.status.job import Incident, JobStatus
from pretrain_operator.facts.fact import (
    Fact,
    GenerationAdopted,
    GenerationAnnounced,
    GenerationEnded,
    JobEnded,
    PodsObserved,
    ProfileRefused,
    Reported,
)

CHECKPOINT_CORRUPT = "CheckpointCorrupt"
DIVERGENCES = ("LossSpike", "LossNotFinite")
NEVER = float("-inf")

Occurrence = tuple[str, int, float]
"""Cause, completed steps and start of a divergence."""


@dataclass(frozen=True)
class LineagePosition:
    """Place of a run in its lineage, and the occurrences that a repetition is recognised by."""

    generation: int = 0
    """Generation that trained last, by the number under which it was formed."""
    rolled_to: int = 0
    """Number that its ranks took by a rollback; 0: none."""
    step: int = 0
    """Completed steps."""
    current: int = 0
    """Generation announced or adopted last by this process."""
    ended: int = 0
    """Generation that ended last; reports of its steps may still arrive."""
    saved: str | None = None
    """Key of the latest checkpoint reported as saved."""
    lineage: tuple[int, int] = (0, 0)
    """(number, step) up to which checkpoints are known."""
    rejected: frozenset[str] = frozenset()
    """Keys of the checkpoints rejected since the last completed step."""
    divergences: frozenset[Occurrence] = frozenset()
    """Divergences that led to a rollback."""
    diverged_at: float = NEVER
    """From the status only: time of the divergence before `rolled_to`. Steps until then are replayed ones."""
    resumed: frozenset[str] = frozenset()
    """Commands whose hold ended without a change of generation."""
    profiles: frozenset[str] = frozenset()
    """Requests for a profile that are answered."""
    closed: bool = False
    """The job ended."""

    def number(self, generation: int) -> int:
        """Return the lineage number of this generation's ranks, which a rollback changes."""
        return self.rolled_to if self.rolled_to and generation == self.generation else generation


def position_of(status: JobStatus) -> LineagePosition:
    """Return the position that a status shows."""
    last = status.generations[-1] if status.generations else None
    rolled_to = last.number if last is not None and last.formed_as is not None else 0
    key = status.latest_checkpoint
    rollbacks = [item for item in status.incidents if item.cause in DIVERGENCES and item.action in ("", "RolledBack")]
    latest = next((item for item in reversed(rollbacks) if item.action), None)
    diverged_at = _detected_at(latest) if latest is not None and rolled_to else NEVER
    return LineagePosition(
        generation=(last.formed_as or last.number) if last is not None else 0,
        rolled_to=rolled_to,
        step=status.step,
        saved=key,
        lineage=max((rolled_to, 0), _place(key) or (0, 0)),
        rejected=frozenset(_rejected_key(item) for item in status.incidents if _is_open_rejection(item)),
        divergences=frozenset((item.cause, item.step, item.time) for item in rollbacks),
        diverged_at=diverged_at,
        profiles=frozenset(profile.id for profile in status.profiles),
        closed=status.phase in ("Succeeded", "Failed"),
    )


@dataclass(frozen=True)
class AdmittedFact:
    """An admitted fact, with the position before and after it."""

    fact: Fact
    before: LineagePosition
    after: LineagePosition


class FactLog:
    """Admits facts in order and keeps the position; pure book-keeping without clock and I/O."""

    def __init__(self, status: JobStatus) -> None:
        self.position = position_of(status)

    def admit(self, fact: Fact) -> AdmittedFact | None:
        """Return the fact's entry, or None for a repetition, an outdated report or a fact after the job's end."""
        before = self.position
        if _is_excluded(before, fact):
            return None
        self.position = advance(before, fact)
        return AdmittedFact(fact, before, self.position)


def is_repetition(position: LineagePosition, fact: Reported) -> bool:
    """Decide whether the occurrence that a rank reports is known. Kinds without a rule here are always new."""
    match body := fact.body:
        case Restored():
            return fact.generation == position.generation
        case StepDone() | Diverged(action="Drop"):  # a dropped update completes its step
            if fact.generation != position.generation:
                return False
            return body.step <= position.step or fact.time <= position.diverged_at
        case Saved():
            place = _place(body.checkpoint)
            return body.checkpoint == position.saved if place is None else place <= position.lineage
        case Diverged(action="Rollback"):
            return _occurrence(fact.time, body) in position.divergences
        case RolledBack():
            return body.number <= max(position.rolled_to, fact.generation)
        case CheckpointRejected():
            return body.checkpoint in position.rejected
        case Held() | Resumed():
            return body.command_id in position.resumed
        case Profiled() | ProfileFailed():
            return body.command_id in position.profiles
        case _:
            return False


def advance(position: LineagePosition, fact: Fact) -> LineagePosition:
    """Return the position after a fact that is no repetition."""
    match fact:
        case Reported():
            return _reported(position, fact)
        case GenerationAnnounced() | GenerationAdopted():
            return replace(position, current=fact.generation.number)
        case GenerationEnded():
            return replace(position, ended=fact.number)
        case ProfileRefused():
            return replace(position, profiles=position.profiles | {fact.request})
        case JobEnded():
            return replace(position, closed=True)
        case _:
            return position


def _reported(position: LineagePosition, fact: Reported) -> LineagePosition:
    match body := fact.body:
        case Restored():
            return replace(_in_generation(position, fact.generation), step=body.step)
        case StepDone():
            rejected = position.rejected if fact.generation == position.ended else frozenset[str]()
            return replace(_in_generation(position, fact.generation), step=body.step, rejected=rejected)
        case Saved():
            place = max(position.lineage, _place(body.checkpoint) or (0, 0))
            return replace(position, saved=body.checkpoint, lineage=place)
        case Diverged(action="Drop"):
            return replace(position, step=body.step)
        case Diverged(action="Rollback"):
            return replace(position, divergences=position.divergences | {_occurrence(fact.time, body)})
        case RolledBack():
            place = max(position.lineage, (body.number, 0))
            return replace(position, rolled_to=body.number, step=body.rollback.to_step, lineage=place)
        case CheckpointRejected():
            return replace(position, rejected=position.rejected | {body.checkpoint})
        case Resumed():
            return replace(position, resumed=position.resumed | {body.command_id})
        case Profiled() | ProfileFailed():
            return replace(position, profiles=position.profiles | {body.command_id})
        case Finished():
            return replace(position, step=body.step, closed=True)
        case _:
            return position


def _is_excluded(position: LineagePosition, fact: Fact) -> bool:
    if position.closed and isinstance(fact, Reported | GenerationAnnounced | GenerationEnded | PodsObserved | JobEnded):
        return True
    if isinstance(fact, GenerationAdopted):
        return fact.generation.number == position.current
    if isinstance(fact, ProfileRefused):
        return fact.request in position.profiles
    return isinstance(fact, Reported) and (fact.generation < position.generation or is_repetition(position, fact))


def _in_generation(position: LineagePosition, generation: int) -> LineagePosition:
    if generation == position.generation:
        return position
    return replace(position, generation=generation, rolled_to=0, diverged_at=NEVER)


def _occurrence(time: float, body: Diverged) -> Occurrence:
    return body.cause, body.step - 1, time - body.seconds


def _place(key: str | None) -> tuple[int, int] | None:
    return parse_manifest_key(key) if key else None


def _detected_at(incident: Incident) -> float:
    return incident.time + (incident.detected_seconds or 0.0)


def _is_open_rejection(incident: Incident) -> bool:
    return incident.cause == CHECKPOINT_CORRUPT and incident.resumed_seconds is None and incident.action != "Failed"


def _rejected_key(incident: Incident) -> str:
    return incident.message.partition(": ")[0]
