"""The status that a decision comes to, and what people are told of its changes."""

from __future__ import annotations

from pretrain_api.job import PretrainJob
from pretrain_api.runreport import Condition, JobStatus, WorkerStatus
from pretrain_operator.cluster import Event
from pretrain_operator.conditions import condition_of, with_condition
from pretrain_operator.lifecycle import Verdict
from pretrain_operator.observe import Observed, Worker


def compose(job: PretrainJob, facts: JobStatus, verdict: Verdict, seen: Observed, now: float) -> JobStatus:
    """What the ledger knows, what was decided and what was seen, as one status."""
    view = seen.view
    books = facts.bookkeeping.model_copy(
        update={"slots": tuple(memory for _, memory in sorted(seen.history.slots.items()))}
    )
    return facts.model_copy(
        update={
            "phase": verdict.phase,
            "reason": verdict.reason,
            "message": verdict.message,
            "job_uid": facts.job_uid or job.metadata.uid,
            "generation": max(facts.generation, view.highest_number),
            "replicas": sum(worker.pod.alive for worker in seen.workers),
            "workers": worker_statuses(seen),
            "selector": f"pretrain.dev/job={job.metadata.name}",
            "total_steps": job.spec.training.total_steps,
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
        tuple((item.type, item.status) for item in status.conditions),
    )


def phase_event(before: JobStatus, after: JobStatus) -> tuple[Event, ...]:
    """The change of phase, told to people."""
    if (before.phase, before.reason) == (after.phase, after.reason):
        return ()
    kind = "Warning" if after.phase in ("Failed", "Recovering") else "Normal"
    message = after.message if after.reason == after.phase else f"{after.phase}: {after.message}"
    return (Event(kind, after.reason, message),)


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


def _conditions(job: PretrainJob, seen: Observed, verdict: Verdict, now: float) -> tuple[Condition, ...]:
    """`Training` and `Degraded` always; `Suspended`, `Complete` and `Failed` from the first time they are true."""
    members = len(seen.view.current.members) if seen.view.current is not None else 0
    wanted = job.spec.workers.replicas
    degraded = verdict.runs and (verdict.phase == "Recovering" or (verdict.phase == "Training" and members < wanted))
    truths = {
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
        new = Condition(
            type=kind,
            status="True" if true else "False",
            reason=reason,
            message=message,
            observed_generation=job.metadata.generation,
        )
        conditions = with_condition(conditions, new, now)
    return conditions
