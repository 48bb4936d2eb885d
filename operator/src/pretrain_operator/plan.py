"""What to do about a job now: a pure function of what was observed. The same input gives the same decision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pretrain_api.job import PretrainJob
from pretrain_operator.budget import delay_after
from pretrain_operator.cluster import Placement, Pod
from pretrain_operator.conditions import seconds_true
from pretrain_operator.coordinator.types import Want
from pretrain_operator.lifecycle import EndReason, Verdict, lifecycle
from pretrain_operator.observe import Identity, Observed, Worker

LOST_AGENT_SECONDS = 5.0
"""A worker whose agent is in no generation and was not heard for so long is replaced, its pod alive or not."""
LINGER_SECONDS = 5.0
"""Agents that were let go have so long to exit by themselves; a worker that never joined is deleted at once."""
GRACE_SECONDS = 30.0
"""A worker that is taken away on purpose has so long to end."""
CONDITION_OF_PHASE = {"Succeeded": "Complete", "Failed": "Failed", "Suspended": "Suspended"}


@dataclass(frozen=True)
class CreatePod:
    """Start a worker under an identity never used before."""

    slot: int
    attempt: int
    placement: Placement = field(default_factory=Placement)


@dataclass(frozen=True)
class DeletePod:
    """End a worker, or remove what is left of one."""

    pod: Pod
    grace_seconds: float


@dataclass(frozen=True)
class EndAgents:
    """Let all agents go."""

    reason: EndReason
    message: str


Action = CreatePod | DeletePod | EndAgents


@dataclass(frozen=True)
class Decision:
    """What the coordinator is asked, what is done to the cluster, what the status will say."""

    want: Want
    verdict: Verdict
    actions: tuple[Action, ...] = ()
    requeue_after: float | None = None
    """Seconds after which time alone may change the decision."""


@dataclass
class _Pods:
    """The decisions on pods, gathered slot by slot."""

    actions: list[Action] = field(default_factory=list[Action])
    may_join: set[Identity] = field(default_factory=set[Identity])
    remove: set[int] = field(default_factory=set[int])
    waits: list[float] = field(default_factory=list[float])


def plan(job: PretrainJob, seen: Observed, now: float) -> Decision:
    """Decide: first what the job is to do, then which pods should exist for it."""
    verdict = lifecycle(job, seen, now)
    pods = _Pods()
    if verdict.runs:
        _run_pods(pods, job, seen, now)
    else:
        _end_pods(pods, verdict, seen, now)
    return Decision(
        want=_want(job, verdict, pods),
        verdict=verdict,
        actions=tuple(pods.actions),
        requeue_after=max(0.0, min(pods.waits)) if pods.waits else None,
    )


def _want(job: PretrainJob, verdict: Verdict, pods: _Pods) -> Want:
    workers, hang = job.spec.workers, job.spec.recovery.hang
    return Want(
        replicas=_replicas(job),
        min=workers.elastic.min,
        max=workers.max,
        shrink_after=workers.elastic.shrink_after.total_seconds(),
        running=verdict.runs,
        hang_timeout=hang.timeout.total_seconds() if hang else None,
        pods=frozenset(pods.may_join),
        remove_slots=frozenset(pods.remove),
    )


def _replicas(job: PretrainJob) -> int:
    workers = job.spec.workers
    return max(workers.elastic.min, min(workers.replicas, workers.max))


def _run_pods(pods: _Pods, job: PretrainJob, seen: Observed, now: float) -> None:
    """Slots 0..replicas+spares-1 have one living pod each, others none."""
    wanted = range(_replicas(job) + job.spec.workers.spares)
    for slot in sorted({*wanted, *(worker.pod.slot for worker in seen.workers)}):
        workers = [worker for worker in seen.workers if worker.pod.slot == slot]
        living = [worker for worker in workers if worker.pod.alive]
        newest = workers[-1].pod.attempt if workers else -1
        _bury(pods, (w for w in workers if not w.pod.alive and (slot not in wanted or w.pod.attempt < newest)), seen)
        for older in living[:-1]:
            pods.actions.append(DeletePod(older.pod, 0.0))
        current = living[-1] if living else None
        if slot not in wanted:
            _take_away(pods, current)
        elif current is None:
            _start(pods, slot, seen, now)
        elif _is_lost(current):
            pods.actions.append(DeletePod(current.pod, 0.0))
            _start(pods, slot, seen, now)
        else:
            pods.may_join.add(current.identity)
            if not current.member and current.silent_seconds > 0:
                pods.waits.append(LOST_AGENT_SECONDS - current.silent_seconds)


def _start(pods: _Pods, slot: int, seen: Observed, now: float) -> None:
    """The next attempt of a slot: at once, unless the ones before it never even joined."""
    memory = seen.history.slots.get(slot)
    wait = 0.0 if memory is None else memory.failed_at + delay_after(memory.failures) - now
    if wait > 0:
        pods.waits.append(wait)
        return
    attempt = seen.history.next_attempt(slot)
    pods.actions.append(CreatePod(slot, attempt, Placement()))
    pods.may_join.add((slot, attempt))  # its agent may be here before the next round


def _take_away(pods: _Pods, worker: Worker | None) -> None:
    """Scale-down: first out of the generation, at a step boundary, then away."""
    if worker is None:
        return
    pods.may_join.add(worker.identity)
    pods.remove.add(worker.pod.slot)
    if not worker.member and not worker.pod.deleting:
        pods.actions.append(DeletePod(worker.pod, GRACE_SECONDS))


def _is_lost(worker: Worker) -> bool:
    """Its agent is in no generation, was heard once, and no more."""
    return not worker.member and worker.silent_seconds >= LOST_AGENT_SECONDS


def _end_pods(pods: _Pods, verdict: Verdict, seen: Observed, now: float) -> None:
    """Nobody is wanted any more. What is left of pods stays where the job ended, for their logs."""
    living = [worker for worker in seen.workers if worker.pod.alive]
    pods.may_join.update(worker.identity for worker in living)
    if verdict.end is None or seen.written.phase != verdict.phase:
        return  # the workers go once the end is written: an operator that starts anew must not train on
    if any(agent.connected for agent in seen.view.agents):
        pods.actions.append(EndAgents(verdict.end, verdict.message))
    if verdict.end == "suspended":
        _bury(pods, (worker for worker in seen.workers if not worker.pod.alive), seen)
    since = seconds_true(seen.written.conditions, CONDITION_OF_PHASE[verdict.phase], now)
    lingers = since is not None and since < LINGER_SECONDS
    told = [worker for worker in living if lingers and seen.history.joined(*worker.identity)]
    pods.waits += [LINGER_SECONDS - since] if since is not None and told else []
    pods.actions += [
        DeletePod(worker.pod, GRACE_SECONDS) for worker in living if worker not in told and not worker.pod.deleting
    ]


def _bury(pods: _Pods, dead: Iterable[Worker], seen: Observed) -> None:
    """Remove what is left of pods whose attempt is on record: otherwise it could be used again."""
    recorded = {memory.slot: memory.attempt for memory in seen.written.bookkeeping.slots}
    pods.actions += [
        DeletePod(worker.pod, 0.0)
        for worker in dead
        if not worker.pod.deleting and worker.pod.attempt <= recorded.get(worker.pod.slot, -1)
    ]
