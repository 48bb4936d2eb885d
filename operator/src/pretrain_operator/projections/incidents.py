"""Faults and how they were overcome, from the facts in their order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from pretrain_api.checkpoint.lineage import Rollback
from pretrain_api.messages.protocol import Generation
from pretrain_api.status.job import Incident
from pretrain_operator.cluster import InjectedFault
from pretrain_operator.facts.fact import Announced, Ended

MAX_INCIDENTS = 100
"""Kept in the status, the newest ones: it must fit into an object of the API server."""
SAME_WORKER_SECONDS = 120.0
"""How long before the end of a generation the fault of the worker that ended it may lie: silence takes time to tell."""
OTHER_WORKER_SECONDS = 5.0
"""The same where another worker noticed first: a broken collective tells within moments."""
CORRUPT = "CheckpointCorrupt"
ROLLED_BACK = "RolledBack"
DIVERGENCES = ("LossSpike", "LossNotFinite")
SAME_DIVERGENCE_STEPS = 10
"""Updates dropped or warnings within so many steps are one incident."""
GRACEFUL_FAULTS = ("add:", "remove:", "term:")
"""What begins the description of an injected fault that is no incident when all goes well."""


@dataclass(frozen=True)
class Case:
    """An incident with points in time where `Incident` has seconds since the fault."""

    cause: str
    worker: int | None
    node: str
    step: int
    fault: float
    detected: float | None = None
    reformed: float | None = None
    restarted: float | None = None
    restored: float | None = None
    resumed: float | None = None
    steps_lost: int | None = None
    action: str = ""
    message: str = ""
    generation: int | None = None
    """The newest one that is to overcome it."""

    @property
    def open(self) -> bool:
        """Training has not gone on yet."""
        return self.resumed is None and self.action != "Failed"


@dataclass
class Recovery:
    """The generation that was announced last, and what its ranks said so far."""

    generation: Generation
    started: dict[int, float] = field(default_factory=dict[int, float])


class IncidentLog:
    """The incidents of a job, oldest first. A second fault before the job trained again is an incident of its own; the
    points of recovery of both are then those of the generation that did train."""

    def __init__(self, known: Iterable[Incident] = ()) -> None:
        self._cases = [_case(incident) for incident in known]
        self._recovery: Recovery | None = None

    @property
    def recovering(self) -> str:
        """The cause of the newest incident that is not overcome yet, or an empty text."""
        return next((case.cause for case in reversed(self._cases) if case.open), "")

    def incidents(self) -> tuple[Incident, ...]:
        """As the status has them."""
        return tuple(_incident(case) for case in self._cases)

    def adopt(self, generation: Generation) -> None:
        """A generation that was there before this log."""
        self._recovery = Recovery(generation)
        self._update(generation=generation.number)

    def rejected(self, checkpoint: str, message: str, step: int, time: float) -> bool:
        """Ranks could not use the checkpoint of `step`; False: it was known. What an open incident before it cost is
        known then: the steps down to this checkpoint. Those below it are the cost of this one."""
        if any(case.open and case.message.startswith(checkpoint) for case in self._cases):
            return False
        self._lose_steps_above(step)
        text = f"{checkpoint}: {message}" if message else checkpoint
        self._append(Case(CORRUPT, None, "", step, time, detected=time, message=text))
        return True

    def diverged(self, cause: str, step: int, began: float, time: float, message: str) -> None:
        """The loss diverged after `step` steps, and an earlier state is about to be gone back to."""
        self._append(Case(cause, None, "", step, began, detected=time, message=message))

    def rolled_back(self, rollback: Rollback) -> None:
        """An earlier state was gone back to, by these ranks or by those before them."""
        self._cases = [
            replace(case, action=ROLLED_BACK, steps_lost=max(0, rollback.step - 1 - rollback.to_step))
            if case.open and case.cause in DIVERGENCES
            else case
            for case in self._cases
        ]

    def noted(self, cause: str, action: str, step: int, began: float, time: float, message: str) -> bool:
        """The loss of a step diverged, and training goes on without a pause; False: so it did just before."""
        last = next((case for case in reversed(self._cases) if case.cause == cause and case.action == action), None)
        if last is not None and step - last.step <= SAME_DIVERGENCE_STEPS:
            return False
        case = Case(cause, None, "", step, began, detected=time, resumed=time, steps_lost=0, message=message)
        self._append(replace(case, action=action))
        return True

    def ended(self, fact: Ended, step: int, lost: int | None) -> None:
        """A generation ended after `step` steps, of which it lost `lost`; None: the next restored state will tell. An
        end that was intended only delays a recovery under way."""
        self._update(reformed=None, restarted=None, restored=None)
        if fact.intended:
            return
        if fact.cause == "CheckpointRejected" and self._knows_rejection():
            return
        cause = CORRUPT if fact.cause == "CheckpointRejected" else fact.cause
        case = Case(cause, fact.slot, fact.node, step, fact.fault_time, detected=fact.time, message=fact.message)
        self._append(replace(case, steps_lost=lost))

    def announced(self, fact: Announced) -> None:
        """The next generation went out."""
        action = self._action(fact.generation)
        self._recovery = Recovery(fact.generation)
        rolled_back = [case.action == ROLLED_BACK for case in self._cases]
        self._update(reformed=fact.time, generation=fact.generation.number, action=action)
        self._cases = [
            replace(case, action="FellBack" if case.cause == CORRUPT else ROLLED_BACK if rolled else case.action)
            if case.open
            else case
            for case, rolled in zip(self._cases, rolled_back, strict=True)
        ]

    def started(self, rank: int, time: float) -> bool:
        """A rank of the newest generation runs; True: all of them do."""
        if self._recovery is None:
            return False
        self._recovery.started.setdefault(rank, time)
        if len(self._recovery.started) < self._recovery.generation.world_size:
            return False
        last = max(self._recovery.started.values())
        self._cases = [
            replace(case, restarted=last) if case.generation == self._recovery.generation.number else case
            for case in self._cases
        ]
        return True

    def restored(self, step: int, time: float) -> None:
        """The state of `step` stands."""
        self._lose_steps_above(step)
        self._update(restored=time)

    def resumed(self, time: float) -> None:
        """A step was done: everything is overcome."""
        self._update(resumed=time)

    def failed(self) -> None:
        """The job ended over what is not overcome."""
        self._update(action="Failed")

    def match(self, faults: Iterable[InjectedFault]) -> None:
        """Count from the time of the injected fault where there is one; each belongs to one incident only."""
        unused = [
            fault
            for fault in faults
            if fault.slot is not None
            and not fault.description.startswith(GRACEFUL_FAULTS)
            and all(case.fault != fault.time for case in self._cases)
        ]
        injected = {fault.time for fault in faults}
        for index, case in enumerate(self._cases):
            if case.fault in injected or case.cause in (CORRUPT, *DIVERGENCES):
                continue
            if (fault := _closest(case, unused)) is not None:
                unused.remove(fault)
                self._cases[index] = replace(case, fault=fault.time)

    def _update(self, **changes: float | str | None) -> None:
        """Change every case that is open."""
        self._cases = [replace(case, **changes) if case.open else case for case in self._cases]

    def _lose_steps_above(self, step: int) -> None:
        for index, case in enumerate(self._cases):
            if case.open and case.steps_lost is None:
                self._cases[index] = replace(case, steps_lost=max(0, case.step - step))

    def _append(self, case: Case) -> None:
        self._cases = [*self._cases, case][-MAX_INCIDENTS:]

    def _knows_rejection(self) -> bool:
        return any(case.open and case.cause == CORRUPT and case.reformed is None for case in self._cases)

    def _action(self, generation: Generation) -> str:
        before = self._recovery.generation.members if self._recovery else ()
        same = {member.agent_id for member in before} == {member.agent_id for member in generation.members}
        return "Restarted" if same else "Reformed"


def _closest(case: Case, faults: Iterable[InjectedFault]) -> InjectedFault | None:
    """The fault that explains the case: of the same worker, else of another one moments before; the latest of those."""
    detected = case.fault if case.detected is None else case.detected
    ages = [(detected - fault.time, fault) for fault in faults if fault.time <= detected]
    same = [(age, fault) for age, fault in ages if fault.slot == case.worker and age <= SAME_WORKER_SECONDS]
    other = [(age, fault) for age, fault in ages if age <= OTHER_WORKER_SECONDS]
    return min(same or other, key=lambda aged: aged[0])[1] if same or other else None


def _incident(case: Case) -> Incident:
    def since(moment: float | None) -> float | None:
        return None if moment is None else round(max(0.0, moment - case.fault), 6)

    return Incident(
        cause=case.cause,
        worker=case.worker,
        node=case.node,
        step=case.step,
        time=case.fault,
        detected_seconds=since(case.detected),
        reformed_seconds=since(case.reformed),
        restarted_seconds=since(case.restarted),
        restored_seconds=since(case.restored),
        resumed_seconds=since(case.resumed),
        steps_lost=case.steps_lost,
        action=case.action,
        message=case.message,
    )


def _case(incident: Incident) -> Case:
    def at(seconds: float | None) -> float | None:
        return None if seconds is None else incident.time + seconds

    return Case(
        cause=incident.cause,
        worker=incident.worker,
        node=incident.node,
        step=incident.step,
        fault=incident.time,
        detected=at(incident.detected_seconds),
        reformed=at(incident.reformed_seconds),
        restarted=at(incident.restarted_seconds),
        restored=at(incident.restored_seconds),
        resumed=at(incident.resumed_seconds),
        steps_lost=incident.steps_lost,
        action=incident.action,
        message=incident.message,
    )
