"""Policies for one slot: keep, drain or replace its pod, or create the next one. The first matching policy wins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pretrain_api.backoff import Backoff
from pretrain_api.spec.job import PretrainJob
from pretrain_operator.cluster import Placement
from pretrain_operator.decide.observe import Observed
from pretrain_operator.decide.placement import next_release
from pretrain_operator.decide.replacement import deadlines, expired_deadline, is_outdated
from pretrain_operator.decide.workers import ObservedWorker
from pretrain_operator.liveness.timings import TIMINGS
from pretrain_operator.projections.goodput import STEPPING

RESTART_BACKOFF = Backoff(first=1.0, factor=2.0, most=300.0, jitter=0.0)
"""Delay of a slot's next pod from the third attempt on. Without jitter: the same input gives the same decision."""

SlotAction = Literal["keep", "drain", "replace", "fail", "leave", "wait", "create"]


@dataclass(frozen=True)
class SlotVerdict:
    """The action for a slot. `replace` deletes the pod and creates the next one when it is due; `fail` only deletes."""

    slot: int
    action: SlotAction
    reason: str
    message: str = ""
    requeue_after: float | None = None
    """Seconds after which time alone may change the verdict."""


@dataclass(frozen=True)
class SlotInput:
    """One slot of a running job."""

    slot: int
    wanted: bool
    """The slot needs a live pod."""
    workers: tuple[ObservedWorker, ...]
    """Its pods, ordered by attempt."""
    job: PretrainJob
    observed: Observed
    placement: Placement
    """Placement of a pod that is created now."""
    alone: bool
    """At most one live worker of the job has ever joined."""
    now: float

    @property
    def live(self) -> tuple[ObservedWorker, ...]:
        """Live pods."""
        return tuple(worker for worker in self.workers if worker.pod.alive)

    @property
    def current(self) -> ObservedWorker | None:
        """The newest live pod."""
        return self.live[-1] if self.live else None


SlotPolicy = Callable[[SlotInput], SlotVerdict | None]


def slot_verdicts(slot: SlotInput) -> tuple[SlotVerdict, ...]:
    """Return the verdict on the live pod, if there is one, and the verdict on the next one, if it is due."""
    verdicts: list[SlotVerdict] = []
    if slot.current is not None:
        verdicts.append(_first(POD_POLICIES, slot))
    if not verdicts or verdicts[0].action == "replace":
        verdicts.append(_first(CREATE_POLICIES, slot))
    return tuple(verdicts)


def restart_delay(failures: int) -> float:
    """Seconds to wait after this number of consecutive pods of a slot that ended before they joined."""
    return RESTART_BACKOFF.longest(failures - 1) if failures > 1 else 0.0


def replace_outdated(slot: SlotInput) -> SlotVerdict | None:
    """Replace a pod that cannot start as created and would be created differently now."""
    worker = slot.current
    if worker is None:
        return None
    memory = slot.observed.history.slots.get(slot.slot)
    if not is_outdated(worker, memory, slot.job, slot.placement, slot.now):
        return None
    return SlotVerdict(slot.slot, "replace", "Outdated", f"{worker.pod.reason}; a new pod is created differently")


def replace_lost(slot: SlotInput) -> SlotVerdict | None:
    """Replace a pod whose worker is lost; one that never joined is a failed attempt."""
    worker = slot.current
    lost = expired_deadline(worker, alone=slot.alone) if worker is not None else None
    if lost is None:
        return None
    return SlotVerdict(slot.slot, "fail" if lost.failed else "replace", lost.reason, lost.message)


def drain_unwanted(slot: SlotInput) -> SlotVerdict | None:
    """Drain a surplus pod: it leaves the generation at a step boundary and is deleted then."""
    return None if slot.wanted else SlotVerdict(slot.slot, "drain", "ScaledDown", "the job needs fewer workers")


def keep(slot: SlotInput) -> SlotVerdict | None:
    """Keep any other pod until its next deadline."""
    worker = slot.current
    if worker is None:
        return None
    waits = [deadline.seconds_left for deadline in deadlines(worker, alone=slot.alone)]
    release = next_release(slot.observed.projected.suspects, slot.now)
    if worker.pod.phase == "Pending" and release is not None:
        waits.append(release)  # the pod may be kept from the node that it needs
    return SlotVerdict(slot.slot, "keep", "Live", requeue_after=min(waits, default=None))


def leave_unwanted(slot: SlotInput) -> SlotVerdict | None:
    """Leave a surplus slot without a pod."""
    return None if slot.wanted else SlotVerdict(slot.slot, "leave", "ScaledDown", "the job needs fewer workers")


def wait_for_hold(slot: SlotInput) -> SlotVerdict | None:
    """Wait for the last hold to expire: the final report, the backoff, or a refusal of the cluster."""
    ready_at, reason, message = max(_holds(slot))
    if ready_at <= slot.now:
        return None
    return SlotVerdict(slot.slot, "wait", reason, message, requeue_after=ready_at - slot.now)


def create(slot: SlotInput) -> SlotVerdict | None:
    """Create the next attempt of any other slot at once."""
    return SlotVerdict(slot.slot, "create", "Missing", "no live pod has this slot")


POD_POLICIES: tuple[SlotPolicy, ...] = (replace_outdated, replace_lost, drain_unwanted, keep)
"""For a slot with a live pod."""
CREATE_POLICIES: tuple[SlotPolicy, ...] = (leave_unwanted, wait_for_hold, create)
"""For a slot without one."""


def _first(policies: tuple[SlotPolicy, ...], slot: SlotInput) -> SlotVerdict:
    return next(verdict for policy in policies if (verdict := policy(slot)) is not None)


def _holds(slot: SlotInput) -> list[tuple[float, str, str]]:
    """Earliest times of the next attempt, each with its reason."""
    memory, refusal = slot.observed.history.slots.get(slot.slot), slot.observed.refusal
    holds = [(_final_report_due(slot), "FinalReport", "its last agent may still report the end of the job")]
    if memory is not None:
        ready_at = memory.failed_at + restart_delay(memory.failures)
        holds.append((ready_at, "Backoff", f"{memory.failures} pods in a row ended before they joined"))
    if refusal is not None:
        holds.append((refusal.retry_at, refusal.reason, refusal.message))
    return holds


def _final_report_due(slot: SlotInput) -> float:
    """Time until which a worker that succeeded while the job trained may report the last step.

    Rank 0's agent stays until its report is acknowledged, so it is about to reconnect to this operator.
    """
    observed, workers = slot.observed, slot.workers
    if not workers or workers[-1].pod.phase != "Succeeded" or observed.view.current is not None:
        return 0.0
    if observed.projected.state not in STEPPING:
        return 0.0
    return max(observed.healthy_since, workers[-1].pod.finished_at or 0.0) + TIMINGS.agent_return
