"""The status that follows from a decision, and the Events that report its changes."""

from __future__ import annotations

from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import JobStatus, Obstacle, WorkerStatus
from pretrain_operator.cluster import Event
from pretrain_operator.decide.conditions import BLOCKED, condition_of, job_conditions
from pretrain_operator.decide.lifecycle import LifecycleVerdict
from pretrain_operator.decide.observe import Observed
from pretrain_operator.decide.sizing import missing_slots
from pretrain_operator.decide.workers import ObservedWorker
from pretrain_operator.projections.progress import expected_end


def compose(job: PretrainJob, facts: JobStatus, verdict: LifecycleVerdict, observed: Observed, now: float) -> JobStatus:
    """Merge projections, decision and observation into one status."""
    projected, total, trains = observed.projected, job.spec.training.total_steps, verdict.phase == "Training"
    refusal = observed.refusal if verdict.runs and missing_slots(job, observed.pods) else None
    books = facts.bookkeeping.model_copy(
        update={
            "slots": tuple(memory for _, memory in sorted(observed.history.slots.items())),
            "refused": None if refusal is None else Obstacle(reason=refusal.reason, message=refusal.message),
        }
    )
    return facts.model_copy(
        update={
            "phase": verdict.phase,
            "reason": verdict.reason,
            "message": verdict.message,
            "job_uid": facts.job_uid or job.metadata.uid,
            "observed_generation": job.metadata.generation,
            "generation": max(facts.generation, observed.view.highest_number),
            "replicas": sum(worker.pod.alive for worker in observed.workers),
            "workers": worker_statuses(observed),
            "selector": f"pretrain.dev/job={job.metadata.name}",
            "total_steps": total,
            "eta": expected_end(facts.step, total, projected.stepped_at, facts.seconds_per_step) if trains else "",
            "conditions": job_conditions(job, observed, verdict, now),
            "bookkeeping": books,
        }
    )


def worker_statuses(observed: Observed) -> tuple[WorkerStatus, ...]:
    """Return the status of the newest pod of every slot."""
    newest = {worker.pod.slot: worker for worker in observed.workers}
    return tuple(_worker_status(worker, observed) for worker in newest.values())


def urgent_part(status: JobStatus) -> tuple[object, ...]:
    """Return the part whose changes are written at once; the rest is progress, which is written periodically."""
    return (
        status.phase,
        status.reason,
        status.message,
        status.job_uid,
        status.generation,
        status.replicas,
        tuple((worker.slot, worker.attempt, worker.state) for worker in status.workers),
        status.bookkeeping.slots,
        status.bookkeeping.program_failures,
        len(status.incidents),
        status.latest_checkpoint,
        tuple(profile.id for profile in status.profiles),
        tuple((item.type, item.status) for item in status.conditions),
        _blocked_by(status),
    )


def status_events(before: JobStatus, after: JobStatus) -> tuple[Event, ...]:
    """Return the Events that report a change of the status."""
    return (*_obstacle_events(before, after), *_phase_events(before, after))


def _obstacle_events(before: JobStatus, after: JobStatus) -> tuple[Event, ...]:
    reason = _blocked_by(after)
    if reason == _blocked_by(before):
        return ()
    blocked = condition_of(after.conditions, BLOCKED)
    if blocked is None or not reason:
        return (Event("Normal", "Unblocked", f"{_blocked_by(before)} is resolved, resuming"),)
    return (Event("Warning", reason, blocked.message),)


def _phase_events(before: JobStatus, after: JobStatus) -> tuple[Event, ...]:
    """Report the change of phase, unless a projection's Event reports the recovery or the resize behind it."""
    if (before.phase, before.reason) == (after.phase, after.reason) or after.reason == _blocked_by(after):
        return ()
    if after.phase == "Recovering" or (after.phase, after.reason) == ("Holding", "Resizing"):
        return ()
    if after.phase == "Training" and (before.phase == "Recovering" or before.reason == "Resizing"):
        return ()
    kind = "Warning" if after.phase == "Failed" else "Normal"
    message = after.message if after.reason == after.phase else f"{after.phase}: {after.message}"
    return (Event(kind, after.reason, message),)


def _blocked_by(status: JobStatus) -> str:
    """Return the reason of the current obstacle; empty: none."""
    blocked = condition_of(status.conditions, BLOCKED)
    return blocked.reason if blocked is not None and blocked.status == "True" else ""


def _worker_status(worker: ObservedWorker, observed: Observed) -> WorkerStatus:
    pod, agent = worker.pod, worker.agent
    return WorkerStatus(
        slot=pod.slot,
        attempt=pod.attempt,
        state=_state(worker),
        rank=agent.rank if agent is not None and worker.member else None,
        node=pod.node or (agent.node if agent is not None else ""),
        pids=_pids(worker, observed),
    )


def _state(worker: ObservedWorker) -> str:
    agent = worker.agent
    if not worker.pod.alive:
        return "Ended" if worker.pod.phase == "Succeeded" else "Lost"
    if worker.pod.deleting or (agent is not None and agent.leaving):
        return "Leaving"
    if worker.member:
        return "Training"
    if agent is None:
        return "Starting"
    return "Joined" if agent.connected else "Lost"


def _pids(worker: ObservedWorker, observed: Observed) -> dict[int, int]:
    """Return the process ids of the worker's global ranks, which are numbered member by member."""
    if observed.view.current is None:
        return {}
    first = 0
    for member in observed.view.current.members:
        if (member.slot, member.attempt) == worker.identity:
            ranks = range(first, first + member.processes)
            return {rank: observed.view.pids[rank] for rank in ranks if rank in observed.view.pids}
        first += member.processes
    return {}
