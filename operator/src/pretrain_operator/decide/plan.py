"""The decision on a job: a pure function of the observation. The same input gives the same decision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pretrain_api.spec.job import PretrainJob
from pretrain_operator.coordinator.types import Want
from pretrain_operator.decide.actions import Action, CreatePod, DeleteJob, DeletePod, EndAgents
from pretrain_operator.decide.conditions import seconds_true
from pretrain_operator.decide.lifecycle import LifecycleVerdict, lifecycle
from pretrain_operator.decide.observe import FINAL_PHASES, Observed
from pretrain_operator.decide.placement import placement
from pretrain_operator.decide.pod_history import Identity
from pretrain_operator.decide.sizing import min_members, replica_quantum, wanted_replicas, wanted_slots
from pretrain_operator.decide.slots import SlotInput, SlotVerdict, slot_verdicts
from pretrain_operator.decide.workers import ObservedWorker, is_alone
from pretrain_operator.liveness.timings import TIMINGS
from pretrain_operator.projections.suspects import judged

END_GRACE_SECONDS = 30.0
"""Grace period of workers after the end of the job, when nothing is left to save."""
CONDITION_OF_PHASE = {"Succeeded": "Complete", "Failed": "Failed", "Suspended": "Suspended"}


@dataclass(frozen=True)
class Decision:
    """The coordinator's input, the actions on the cluster, and the verdicts behind them."""

    want: Want
    verdict: LifecycleVerdict
    slots: tuple[SlotVerdict, ...] = ()
    actions: tuple[Action, ...] = ()
    requeue_after: float | None = None
    """Seconds after which time alone may change the decision."""


@dataclass
class _PodPlan:
    """Decisions on pods, collected slot by slot."""

    verdicts: list[SlotVerdict] = field(default_factory=list[SlotVerdict])
    actions: list[Action] = field(default_factory=list[Action])
    may_join: set[Identity] = field(default_factory=set[Identity])
    drain: set[int] = field(default_factory=set[int])
    waits: list[float] = field(default_factory=list[float])


def plan(job: PretrainJob, observed: Observed, now: float) -> Decision:
    """Decide on the job's phase first, then on the pods that should exist for it."""
    verdict = lifecycle(job, observed, now)
    pods = _PodPlan()
    if verdict.runs:
        _plan_running(pods, job, observed, now)
    else:
        _plan_end(pods, verdict, observed, now)
        _plan_ttl(pods, job, verdict, observed, now)
    return Decision(
        want=_want(job, verdict, pods, observed),
        verdict=verdict,
        slots=tuple(pods.verdicts),
        actions=tuple(pods.actions),
        requeue_after=max(0.0, min(pods.waits)) if pods.waits else None,
    )


def _want(job: PretrainJob, verdict: LifecycleVerdict, pods: _PodPlan, observed: Observed) -> Want:
    workers, hang = job.spec.workers, job.spec.recovery.hang
    return Want(
        replicas=wanted_replicas(job),
        min=min_members(job),
        max=workers.max,
        processes=workers.processes_per_worker or 1,
        replica_quantum=replica_quantum(job),
        shrink_after=workers.elastic.shrink_after.total_seconds(),
        running=verdict.runs,
        hang_timeout=hang.timeout.total_seconds() if hang else None,
        ranks_wait=observed.projected.ranks_wait is not None,
        pods=frozenset(pods.may_join),
        remove_slots=frozenset(pods.drain),
        profile=observed.profile if verdict.runs else None,
    )


def _plan_running(pods: _PodPlan, job: PretrainJob, observed: Observed, now: float) -> None:
    """Give each wanted slot one live pod, and other slots none."""
    wanted = wanted_slots(job)
    projected, workers = observed.projected, observed.workers
    suspects = judged(projected.suspects, job.spec.recovery.suspects, now)
    where = placement(suspects, workers, projected.grace_seconds, now)
    alone = is_alone(workers)
    for number in sorted({*wanted, *(worker.pod.slot for worker in workers)}):
        own = tuple(worker for worker in workers if worker.pod.slot == number)
        slot = SlotInput(number, number in wanted, own, job, observed, where, alone, now)
        _remove_superseded(pods, slot)
        for verdict in slot_verdicts(slot):
            pods.verdicts.append(verdict)
            _apply(pods, slot, verdict)


def _remove_superseded(pods: _PodPlan, slot: SlotInput) -> None:
    """Remove pods of earlier attempts. The newest pod of a wanted slot stays until its successor exists."""
    newest = slot.workers[-1].pod.attempt if slot.workers else -1
    ended = (worker for worker in slot.workers if not worker.pod.alive)
    _remove_ended(pods, (w for w in ended if not slot.wanted or w.pod.attempt < newest), slot.observed)
    for older in slot.live[:-1]:
        pods.actions.append(DeletePod(older.pod, 0.0))


def _apply(pods: _PodPlan, slot: SlotInput, verdict: SlotVerdict) -> None:
    if verdict.requeue_after is not None:
        pods.waits.append(verdict.requeue_after)
    if verdict.action == "create":
        attempt = slot.observed.history.next_attempt(slot.slot)
        pods.actions.append(CreatePod(slot.slot, attempt, slot.placement))
        pods.may_join.add((slot.slot, attempt))  # its agent may connect before the next reconcile
    worker = slot.current
    if worker is None:
        return
    match verdict.action:
        case "keep":
            pods.may_join.add(worker.identity)
        case "drain":
            pods.may_join.add(worker.identity)
            pods.drain.add(slot.slot)
            if not worker.member and not worker.pod.deleting:
                pods.actions.append(DeletePod(worker.pod, slot.observed.projected.grace_seconds))
        case "replace" | "fail":
            pods.actions.append(DeletePod(worker.pod, 0.0))
        case "create" | "wait" | "leave":
            pass


def _plan_end(pods: _PodPlan, verdict: LifecycleVerdict, observed: Observed, now: float) -> None:
    """Terminate all workers. Terminated pods of an ended job stay, for their logs."""
    live = [worker for worker in observed.workers if worker.pod.alive]
    pods.may_join.update(worker.identity for worker in live)
    if verdict.end is None or observed.written.phase != verdict.phase:
        return  # workers stop once the end is written: a restarted operator must not resume training
    if any(agent.connected for agent in observed.view.agents):
        pods.actions.append(EndAgents(verdict.end, verdict.message))
    if verdict.end == "suspended":
        _remove_ended(pods, (worker for worker in observed.workers if not worker.pod.alive), observed)
    since = seconds_true(observed.written.conditions, CONDITION_OF_PHASE[verdict.phase], now)
    lingers = since is not None and since < TIMINGS.linger
    exiting = [worker for worker in live if lingers and observed.history.joined(*worker.identity)]
    pods.waits += [TIMINGS.linger - since] if since is not None and exiting else []
    pods.actions += [
        DeletePod(worker.pod, END_GRACE_SECONDS) for worker in live if worker not in exiting and not worker.pod.deleting
    ]


def _plan_ttl(pods: _PodPlan, job: PretrainJob, verdict: LifecycleVerdict, observed: Observed, now: float) -> None:
    """Delete an ended job without live workers once its TTL is over."""
    ttl = job.spec.ttl_after_finished
    if ttl is None or verdict.phase not in FINAL_PHASES or any(w.pod.alive for w in observed.workers):
        return
    since = seconds_true(observed.written.conditions, CONDITION_OF_PHASE[verdict.phase], now)
    if since is None:
        return  # the end is not written yet
    if since >= ttl.total_seconds():
        pods.actions.append(DeleteJob())
    else:
        pods.waits.append(ttl.total_seconds() - since)


def _remove_ended(pods: _PodPlan, ended: Iterable[ObservedWorker], observed: Observed) -> None:
    """Remove terminated pods whose attempt is recorded in the status: an unrecorded attempt could be used again."""
    recorded = {memory.slot: memory.attempt for memory in observed.written.bookkeeping.slots}
    pods.actions += [
        DeletePod(worker.pod, 0.0)
        for worker in ended
        if not worker.pod.deleting and worker.pod.attempt <= recorded.get(worker.pod.slot, -1)
    ]
