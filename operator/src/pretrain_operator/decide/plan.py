"""What to do about a job now: a pure function of what was observed. The same input gives the same decision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pretrain_api.spec.job import PretrainJob
from pretrain_operator.cluster import Placement, Pod
from pretrain_operator.coordinator.types import Want
from pretrain_operator.decide.budget import delay_after
from pretrain_operator.decide.conditions import seconds_true
from pretrain_operator.decide.lifecycle import EndReason, Verdict, lifecycle
from pretrain_operator.decide.observe import Identity, Observed, Worker, fewest, unit, wanted_replicas, wanted_slots
from pretrain_operator.decide.replacement import NEVER, RETURN_SECONDS, Patience, is_alone, made_in_vain, patience
from pretrain_operator.decide.suspects import judged, next_release, placement

LINGER_SECONDS = 5.0
"""Agents that were let go have so long to exit by themselves; a worker that never joined is deleted at once."""
END_GRACE_SECONDS = 30.0
"""After the end of the job a worker has nothing left to save."""
STEPPING = ("training", "redoing", "evaluating", "saving")
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


@dataclass(frozen=True)
class DeleteJob:
    """Remove the job with all that is left of it: its time after the end is over."""


Action = CreatePod | DeletePod | EndAgents | DeleteJob


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
        _end_job(pods, job, verdict, seen, now)
    return Decision(
        want=_want(job, verdict, pods, seen),
        verdict=verdict,
        actions=tuple(pods.actions),
        requeue_after=max(0.0, min(pods.waits)) if pods.waits else None,
    )


def _want(job: PretrainJob, verdict: Verdict, pods: _Pods, seen: Observed) -> Want:
    workers, hang = job.spec.workers, job.spec.recovery.hang
    return Want(
        replicas=wanted_replicas(job),
        min=fewest(job),
        max=workers.max,
        replica_quantum=unit(job),
        shrink_after=workers.elastic.shrink_after.total_seconds(),
        running=verdict.runs,
        hang_timeout=hang.timeout.total_seconds() if hang else None,
        ranks_wait=seen.ranks_wait is not None,
        pods=frozenset(pods.may_join),
        remove_slots=frozenset(pods.remove),
        profile=seen.profile if verdict.runs else None,
    )


def _run_pods(pods: _Pods, job: PretrainJob, seen: Observed, now: float) -> None:
    """Slots 0..replicas+spares-1 have one living pod each, others none."""
    wanted, alone = wanted_slots(job), is_alone(seen.workers)
    suspects = judged(seen.suspects, job.spec.recovery.suspects, now)
    where = placement(suspects, seen.workers, seen.grace_seconds, now)
    for slot in sorted({*wanted, *(worker.pod.slot for worker in seen.workers)}):
        workers = [worker for worker in seen.workers if worker.pod.slot == slot]
        living = [worker for worker in workers if worker.pod.alive]
        newest = workers[-1].pod.attempt if workers else -1
        _bury(pods, (w for w in workers if not w.pod.alive and (slot not in wanted or w.pod.attempt < newest)), seen)
        for older in living[:-1]:
            pods.actions.append(DeletePod(older.pod, 0.0))
        current = living[-1] if living else None
        left = _patience(current, job, where, seen, now, alone=alone) if current is not None else Patience(0.0)
        if current is not None and not left.over:
            if slot in wanted:
                _keep(pods, current, left, seen, now)
            else:
                _take_away(pods, current, seen)
            continue
        pods.actions += [DeletePod(current.pod, 0.0)] if current is not None else []
        if slot in wanted and not left.failed:
            _start(pods, slot, where, seen, now, not_before=_last_word_at(workers, seen))


def _patience(
    worker: Worker, job: PretrainJob, where: Placement, seen: Observed, now: float, *, alone: bool
) -> Patience:
    if made_in_vain(worker, seen.history.slots.get(worker.pod.slot), job, where, now):
        return Patience(0.0)
    return patience(worker, alone=alone)


def _keep(pods: _Pods, worker: Worker, left: Patience, seen: Observed, now: float) -> None:
    pods.may_join.add(worker.identity)
    if left.seconds != NEVER:
        pods.waits.append(left.seconds)
    if worker.pod.phase == "Pending" and (release := next_release(seen.suspects, now)) is not None:
        pods.waits.append(release)  # It may have been kept from the node that it needs.


def _last_word_at(workers: list[Worker], seen: Observed) -> float:
    """A worker that ended well while the job trained has most likely done the last step, unheard by any operator: the
    agent of rank 0 stays until it has told, and is on its way back."""
    if not workers or workers[-1].pod.phase != "Succeeded" or seen.state not in STEPPING or seen.view.current:
        return 0.0
    return max(seen.sound_since, workers[-1].pod.finished_at or 0.0) + RETURN_SECONDS


def _start(pods: _Pods, slot: int, where: Placement, seen: Observed, now: float, *, not_before: float) -> None:
    """The next attempt of a slot: at once, unless the ones before it never even joined, or the cluster refuses."""
    memory = seen.history.slots.get(slot)
    ready_at = not_before
    if memory is not None:
        ready_at = max(ready_at, memory.failed_at + delay_after(memory.failures))
    if seen.refusal is not None:
        ready_at = max(ready_at, seen.refusal.retry_at)
    if ready_at > now:
        pods.waits.append(ready_at - now)
        return
    attempt = seen.history.next_attempt(slot)
    pods.actions.append(CreatePod(slot, attempt, where))
    pods.may_join.add((slot, attempt))  # its agent may be here before the next round


def _take_away(pods: _Pods, worker: Worker, seen: Observed) -> None:
    """Scale-down: first out of the generation, at a step boundary, then away."""
    pods.may_join.add(worker.identity)
    pods.remove.add(worker.pod.slot)
    if not worker.member and not worker.pod.deleting:
        pods.actions.append(DeletePod(worker.pod, seen.grace_seconds))


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
        DeletePod(worker.pod, END_GRACE_SECONDS) for worker in living if worker not in told and not worker.pod.deleting
    ]


def _end_job(pods: _Pods, job: PretrainJob, verdict: Verdict, seen: Observed, now: float) -> None:
    """A job that has ended, whose workers are gone, and whose time is over goes itself."""
    ttl = job.spec.ttl_after_finished
    if ttl is None or verdict.phase not in ("Succeeded", "Failed") or any(w.pod.alive for w in seen.workers):
        return
    since = seconds_true(seen.written.conditions, CONDITION_OF_PHASE[verdict.phase], now)
    if since is None:
        return  # The end is not written yet.
    if since >= ttl.total_seconds():
        pods.actions.append(DeleteJob())
    else:
        pods.waits.append(ttl.total_seconds() - since)


def _bury(pods: _Pods, dead: Iterable[Worker], seen: Observed) -> None:
    """Remove what is left of pods whose attempt is on record: otherwise it could be used again."""
    recorded = {memory.slot: memory.attempt for memory in seen.written.bookkeeping.slots}
    pods.actions += [
        DeletePod(worker.pod, 0.0)
        for worker in dead
        if not worker.pod.deleting and worker.pod.attempt <= recorded.get(worker.pod.slot, -1)
    ]
