"""The status that a decision comes to, and what people are told of its changes."""

from __future__ import annotations

from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import Condition, JobStatus, Obstacle, WorkerStatus
from pretrain_operator.cluster import Event
from pretrain_operator.decide.conditions import condition_of, with_condition
from pretrain_operator.decide.lifecycle import Verdict
from pretrain_operator.decide.observe import Observed, Worker, missing_slots
from pretrain_operator.decide.obstacles import INVALID_SPEC, combined, obstacles
from pretrain_operator.projections.progress import expected_end

BLOCKED = "Blocked"


def compose(job: PretrainJob, facts: JobStatus, verdict: Verdict, seen: Observed, now: float) -> JobStatus:
    """What the ledger knows, what was decided and what was seen, as one status."""
    view, total, trains = seen.view, job.spec.training.total_steps, verdict.phase == "Training"
    refusal = seen.refusal if verdict.runs and missing_slots(job, seen.workers) else None
    books = facts.bookkeeping.model_copy(
        update={
            "slots": tuple(memory for _, memory in sorted(seen.history.slots.items())),
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
            "generation": max(facts.generation, view.highest_number),
            "replicas": sum(worker.pod.alive for worker in seen.workers),
            "workers": worker_statuses(seen),
            "selector": f"pretrain.dev/job={job.metadata.name}",
            "total_steps": total,
            "eta": expected_end(facts.step, total, seen.stepped_at, facts.seconds_per_step) if trains else "",
            "conditions": _conditions(job, seen, verdict, now),
            "bookkeeping": books,
        }
    )


def worker_statuses(seen: Observed) -> tuple[WorkerStatus, ...]:
    """The newest pod of every slot."""
    newest = {worker.pod.slot: worker for worker in seen.workers}
    return tuple(_worker_status(worker, seen) for worker in newest.values())


def urgent_part(status: JobStatus) -> tuple[object, ...]:
    """What must be written at once when it changed; the rest is progress, which may wait a little."""
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


def news(before: JobStatus, after: JobStatus) -> tuple[Event, ...]:
    """What people are told of a change of status, each thing once."""
    return (*_obstacle_events(before, after), *_phase_events(before, after))


def _obstacle_events(before: JobStatus, after: JobStatus) -> tuple[Event, ...]:
    reason = _blocked_by(after)
    if reason == _blocked_by(before):
        return ()
    blocked = condition_of(after.conditions, BLOCKED)
    if blocked is None or not reason:
        return (Event("Normal", "Unblocked", f"{_blocked_by(before)} is mended: the job goes on"),)
    return (Event("Warning", reason, blocked.message),)


def _phase_events(before: JobStatus, after: JobStatus) -> tuple[Event, ...]:
    """The change of phase, unless other events tell of it: the ledger's of a recovery or a change of workers."""
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
    """The reason of what is in the way; empty: nothing is."""
    blocked = condition_of(status.conditions, BLOCKED)
    return blocked.reason if blocked is not None and blocked.status == "True" else ""


def _worker_status(worker: Worker, seen: Observed) -> WorkerStatus:
    pod, agent = worker.pod, worker.agent
    return WorkerStatus(
        slot=pod.slot,
        attempt=pod.attempt,
        state=_state(worker),
        rank=agent.rank if agent is not None and worker.member else None,
        node=pod.node or (agent.node if agent is not None else ""),
        pids=_pids(worker, seen),
    )


def _state(worker: Worker) -> str:
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


def _pids(worker: Worker, seen: Observed) -> dict[int, int]:
    """The worker's share of the global ranks: they are numbered member by member."""
    if seen.view.current is None:
        return {}
    first = 0
    for member in seen.view.current.members:
        if (member.slot, member.attempt) == worker.identity:
            ranks = range(first, first + member.processes)
            return {rank: seen.view.pids[rank] for rank in ranks if rank in seen.view.pids}
        first += member.processes
    return {}


def _obstacle(job: PretrainJob, seen: Observed, verdict: Verdict) -> Obstacle | None:
    """What is in the way of the job as it is: a job that wants no workers can only be told of a mistake in its spec."""
    if verdict.phase in ("Succeeded", "Failed"):
        return None
    found = obstacles(job, seen)
    return combined(found if verdict.runs else [item for item in found if item.reason == INVALID_SPEC])


def _conditions(job: PretrainJob, seen: Observed, verdict: Verdict, now: float) -> tuple[Condition, ...]:
    """`Training` and `Degraded` always; the others from the first time they are true."""
    members = len(seen.view.current.members) if seen.view.current is not None else 0
    wanted = job.spec.workers.replicas
    degraded = verdict.runs and (verdict.phase == "Recovering" or (verdict.phase == "Training" and members < wanted))
    obstacle = _obstacle(job, seen, verdict)
    truths = {
        BLOCKED: obstacle is not None,
        "Training": verdict.phase == "Training",
        "Degraded": degraded,
        "Suspended": verdict.phase == "Suspended",
        "Complete": verdict.phase == "Succeeded",
        "Failed": verdict.phase == "Failed",
    }
    conditions = seen.written.conditions
    for kind, true in truths.items():
        if not true and kind not in ("Training", "Degraded") and condition_of(conditions, kind) is None:
            continue
        reason, message = verdict.reason, verdict.message
        if kind == "Degraded":
            reason = "FewerWorkers" if degraded else "AsWanted"
            message = f"{members} of {wanted} workers train" if degraded else ""
        if kind == BLOCKED:
            reason, message = (obstacle.reason, obstacle.message) if obstacle else ("NothingInTheWay", "")
        new = Condition(
            type=kind,
            status="True" if true else "False",
            reason=reason,
            message=message,
            observed_generation=job.metadata.generation,
        )
        conditions = with_condition(conditions, new, now)
    return conditions
