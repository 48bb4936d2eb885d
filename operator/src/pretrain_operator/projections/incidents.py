"""Projection of incidents: faults, and each stage of the recovery from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from pretrain_api.checkpoint.lineage import Rollback, parse_manifest_key
from pretrain_api.messages.protocol import Generation
from pretrain_api.messages.reports import CheckpointRejected, Diverged, Restored, RolledBack, Started, StepDone
from pretrain_api.status.job import Incident, JobStatus
from pretrain_operator.cluster import Event
from pretrain_operator.facts.fact import (
    FaultsInjected,
    GenerationAdopted,
    GenerationAnnounced,
    GenerationEnded,
    JobEnded,
)
from pretrain_operator.facts.log import CHECKPOINT_CORRUPT, DIVERGENCES
from pretrain_operator.projections.incident_times import IncidentTimes, explain, read, shown
from pretrain_operator.projections.projection import NO_EFFECTS, Context, Effects, Measurement, Projection, counted, on

MAX_INCIDENTS = 100
"""Kept in the status, the newest ones: it must fit into an object of the API server."""
ROLLED_BACK = "RolledBack"
SAME_DIVERGENCE_STEPS = 10
"""Dropped updates or warnings within this number of steps are one incident."""

Change = Callable[[IncidentTimes], IncidentTimes]


@dataclass(frozen=True)
class IncidentSlice:
    """Slice of the status: incidents, oldest first.

    A second fault before the job trains again is an incident of its own. The recovery times of both are then those of
    the generation that did train.
    """

    incidents: tuple[IncidentTimes, ...] = ()

    @property
    def recovering(self) -> str:
        """Cause of the newest open incident; empty if none is open."""
        return next((item.cause for item in reversed(self.incidents) if item.open), "")

    @property
    def restoring(self) -> bool:
        """An incident is open and no state is restored since."""
        return any(item.open and item.restored is None for item in self.incidents)

    def change_open(self, change: Change) -> IncidentSlice:
        """Change every open incident."""
        if not any(item.open for item in self.incidents):
            return self
        return IncidentSlice(tuple(change(item) if item.open else item for item in self.incidents))

    def add(self, item: IncidentTimes) -> IncidentSlice:
        """Add an incident."""
        return IncidentSlice((*self.incidents, item)[-MAX_INCIDENTS:])

    def lose_steps_above(self, step: int) -> IncidentSlice:
        """Charge the steps above the restored or rejected one to the open incidents that have no cost yet."""

        def charged(item: IncidentTimes) -> IncidentTimes:
            return item if item.steps_lost is not None else replace(item, steps_lost=max(0, item.step - step))

        return self.change_open(charged)

    def rolled_back(self, rollback: Rollback) -> IncidentSlice:
        """Note the rollback that answers the open divergences."""

        def answered(item: IncidentTimes) -> IncidentTimes:
            if item.cause not in DIVERGENCES:
                return item
            return replace(item, action=ROLLED_BACK, steps_lost=max(0, rollback.step - 1 - rollback.to_step))

        return self.change_open(answered)


Folded = tuple[IncidentSlice, Effects]


def restore(status: JobStatus) -> IncidentSlice:
    """Read the slice."""
    return IncidentSlice(tuple(map(read, status.incidents)))


def write(slice_: IncidentSlice, status: JobStatus) -> JobStatus:
    """Return the status with the slice in it."""
    return status.model_copy(update={"incidents": tuple(map(shown, slice_.incidents))})


def adopted(slice_: IncidentSlice, fact: GenerationAdopted, _: Context) -> Folded:
    """Expect the adopted generation to resolve the open incidents, except divergences: its ranks roll back."""

    def expected(item: IncidentTimes) -> IncidentTimes:
        if item.cause in DIVERGENCES and item.reformed is None:
            return item
        return replace(item, generation=fact.generation.number)

    return slice_.change_open(expected), NO_EFFECTS


def announced(slice_: IncidentSlice, fact: GenerationAnnounced, context: Context) -> Folded:
    """Note the generation that is to resolve the open incidents."""
    same = _agents(context.membership.current) == _agents(fact.generation)

    def reformed(item: IncidentTimes) -> IncidentTimes:
        action = "Restarted" if same else "Reformed"
        if item.cause == CHECKPOINT_CORRUPT:
            action = "FellBack"
        elif item.action == ROLLED_BACK:
            action = ROLLED_BACK
        return replace(item, reformed=fact.time, generation=fact.generation.number, action=action)

    return slice_.change_open(reformed), NO_EFFECTS


def ended(slice_: IncidentSlice, fact: GenerationEnded, context: Context) -> Folded:
    """Open an incident for a fault. A planned end only restarts the recovery that is under way."""
    if context.state == "suspended":
        return slice_, _restart(fact)
    known_rejection = any(item.open and item.cause == CHECKPOINT_CORRUPT for item in slice_.incidents)
    slice_ = slice_.change_open(lambda item: replace(item, reformed=None, restarted=None, restored=None))
    if fact.intended:
        return slice_, NO_EFFECTS
    ran = context.before.generation == fact.number
    step = max(fact.step, context.before.step) if ran else context.before.step
    effects = Effects(events=(_end_event(fact, step),)) + _restart(fact)
    rejected = fact.cause == "CheckpointRejected"
    if rejected and known_rejection:
        return slice_, effects
    item = IncidentTimes(
        cause=CHECKPOINT_CORRUPT if rejected else fact.cause,
        worker=fact.slot,
        node=fact.node,
        step=step,
        fault=fact.fault_time,
        detected=fact.time,
        steps_lost=None if ran else 0,
        message=fact.message,
    )
    return slice_.add(item), effects


def started(slice_: IncidentSlice, body: Started, context: Context) -> Folded:
    """Note when the last rank of the current generation started, which may be reported late."""
    membership = context.membership
    if membership.current is None or not membership.knows(context.generation):
        return slice_, NO_EFFECTS
    number, at = membership.current.number, membership.with_started(body.rank, context.time).all_started_at
    if at is None or all(item.generation != number for item in slice_.incidents):
        return slice_, NO_EFFECTS
    items = (replace(item, restarted=at) if item.generation == number else item for item in slice_.incidents)
    return IncidentSlice(tuple(items)), NO_EFFECTS


def restored(slice_: IncidentSlice, body: Restored, context: Context) -> Folded:
    """Note when the state was restored, and a rollback that its ranks had no time to report."""
    if len(body.rollbacks) > context.rollbacks:
        slice_ = slice_.rolled_back(body.rollbacks[-1])
    return _restored(slice_, body.step, context.time), NO_EFFECTS


def step_done(slice_: IncidentSlice, body: StepDone, context: Context) -> Folded:
    """Resolve all open incidents, unless the step is a late one of a generation that has ended."""
    if context.late or not slice_.recovering:
        return slice_, NO_EFFECTS
    slice_ = slice_.change_open(lambda item: replace(item, resumed=context.time))
    workers = context.membership.workers(context.generation)
    return slice_, Effects(events=(_recovery_event(shown(slice_.incidents[-1]), body.step, workers),))


def checkpoint_rejected(slice_: IncidentSlice, body: CheckpointRejected, context: Context) -> Folded:
    """Open an incident for a damaged checkpoint.

    The steps above it are lost to the incident that is open already; those below it to this one.
    """
    place = parse_manifest_key(body.checkpoint)
    step = place[1] if place else context.before.step
    text = f"{body.checkpoint}: {body.message}" if body.message else body.checkpoint
    item = IncidentTimes(CHECKPOINT_CORRUPT, None, "", step, context.time, detected=context.time, message=text)
    event = Event("Warning", "CheckpointCorrupt", f"{body.checkpoint} is unusable: {body.message}")
    return slice_.lose_steps_above(step).add(item), Effects(events=(event,))


def diverged(slice_: IncidentSlice, body: Diverged, context: Context) -> Folded:
    """Open an incident that a rollback resolves, or note a dropped update or a warning."""
    measure = "nonfinite_losses" if body.cause == "LossNotFinite" else "loss_spikes"
    counted = Effects(measurements=(Measurement(measure),))
    told = counted + Effects(events=(_divergence_event(body),))
    text, began = f"step {body.step}: {body.message}", context.time - body.seconds
    item = IncidentTimes(body.cause, None, "", body.step, began, detected=context.time, message=text)
    if body.action == "Rollback":
        return slice_.add(replace(item, step=body.step - 1)), told
    action = "UpdateDropped" if body.action == "Drop" else "Warned"
    same = (known for known in reversed(slice_.incidents) if known.cause == body.cause and known.action == action)
    last = next(same, None)
    if last is not None and body.step - last.step <= SAME_DIVERGENCE_STEPS:
        return slice_, counted
    return slice_.add(replace(item, resumed=context.time, steps_lost=0, action=action)), told


def rolled_back(slice_: IncidentSlice, body: RolledBack, context: Context) -> Folded:
    """Note the rollback and the state that it restored."""
    slice_ = _restored(slice_.rolled_back(body.rollback), body.rollback.to_step, context.time)
    return slice_, Effects(events=(_rollback_event(body),), measurements=(Measurement("rollbacks"),))


def faults_injected(slice_: IncidentSlice, fact: FaultsInjected, _: Context) -> Folded:
    """Count from the time of the injected fault that explains an incident."""
    return (IncidentSlice(explain(slice_.incidents, fact.faults)) if fact.faults else slice_), NO_EFFECTS


def job_ended(slice_: IncidentSlice, fact: JobEnded, _: Context) -> Folded:
    """Mark the open incidents of a job that failed."""
    return slice_.change_open(lambda item: replace(item, action="Failed")) if fact.failed else slice_, NO_EFFECTS


def _restored(slice_: IncidentSlice, step: int, time: float) -> IncidentSlice:
    return slice_.lose_steps_above(step).change_open(lambda item: replace(item, restored=time))


def _restart(fact: GenerationEnded) -> Effects:
    return NO_EFFECTS if fact.intended else Effects(measurements=(Measurement("restarts", label=fact.cause),))


def _end_event(fact: GenerationEnded, step: int) -> Event:
    who = "" if fact.slot is None else f" (worker {fact.slot})"
    where = f" on {fact.node}" if fact.node else ""
    text = f"generation {fact.number} ended at step {step}{who}{where}"
    return Event("Warning", fact.cause, f"{text}: {fact.message}" if fact.message else text)


def _recovery_event(incident: Incident, step: int, workers: int) -> Event:
    text = f"step {step} completed by {counted(workers, 'worker')}"
    if incident.resumed_seconds is not None:
        text += f", {incident.resumed_seconds:.1f} s after the fault ({incident.cause})"
    if (lost := incident.steps_lost) is not None:
        text += f", {counted(lost, 'step')} to redo" if lost else ", no step lost"
    return Event("Normal", "Recovered", text)


def _divergence_event(body: Diverged) -> Event:
    consequence = {"Rollback": "", "Drop": "; the update was dropped"}.get(body.action, "; training continues")
    return Event("Warning", body.cause, f"step {body.step}: {body.message}{consequence}")


def _rollback_event(body: RolledBack) -> Event:
    rollback = body.rollback
    text = f"generation {body.number} resumes from step {rollback.to_step}"
    if rollback.skipped is not None:
        text += f" and skips the data of steps {rollback.skipped.first} to {rollback.skipped.last}"
    if rollback.slowed is not None:
        text += f", with {rollback.slowed.factor:g} times the learning rate up to step {rollback.slowed.last}"
    return Event("Warning", "RolledBack", f"{text}; rollback {body.count} of this job")


def _agents(generation: Generation | None) -> Iterable[str]:
    return {member.agent_id for member in generation.members} if generation is not None else set[str]()


INCIDENTS = Projection(
    name="incidents",
    restore=restore,
    write=write,
    rules=(
        on(GenerationAdopted, adopted),
        on(GenerationAnnounced, announced),
        on(GenerationEnded, ended),
        on(Started, started),
        on(Restored, restored),
        on(StepDone, step_done),
        on(CheckpointRejected, checkpoint_rejected),
        on(Diverged, diverged),
        on(RolledBack, rolled_back),
        on(FaultsInjected, faults_injected),
        on(JobEnded, job_ended),
    ),
)
