"""Observation of a job at one moment: pods joined with their agents, and the facts that they show."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pretrain_api.backoff import Backoff
from pretrain_api.messages.profile_request import InvalidRequest, ProfileRequest
from pretrain_api.status.job import JobStatus
from pretrain_operator.cluster import Pod, Snapshot
from pretrain_operator.coordinator.types import CoordinatorView
from pretrain_operator.decide.placement import crashes, silent_nodes
from pretrain_operator.decide.pod_history import Identity, PodHistory
from pretrain_operator.decide.replacement import fell_silent
from pretrain_operator.decide.sizing import missing_slots
from pretrain_operator.decide.workers import ObservedWorker, is_alone, observed_workers
from pretrain_operator.facts.fact import (
    FaultsInjected,
    GenerationAdopted,
    NodesObserved,
    PodsObserved,
    ProfileRefused,
    ServiceFact,
    StartsFailed,
)
from pretrain_operator.liveness.silence import SilenceClock
from pretrain_operator.projections.ledger import Projected

FINAL_PHASES = ("Succeeded", "Failed")


REFUSAL_BACKOFF = Backoff(first=1.0, factor=2.0, most=15.0, jitter=0.0)
"""Retries after refusals. The maximum is the longest time between a fix, such as a raised quota, and the retry."""


@dataclass(frozen=True)
class PodRefusal:
    """The cluster's refusal to create pods."""

    reason: str
    message: str
    times: int = 0
    """Consecutive refusals."""
    retry_at: float = 0.0

    @classmethod
    def after(cls, previous: PodRefusal | None, reason: str, message: str, now: float) -> PodRefusal:
        """Count another refusal and schedule the retry."""
        times = 1 + (previous.times if previous is not None else 0)
        return cls(reason, message, times, now + REFUSAL_BACKOFF.longest(times))


@dataclass(frozen=True)
class ServiceMemory:
    """State of a job's service between two reconciles. The status restores it, but for what was heard since."""

    written: JobStatus = field(default_factory=JobStatus)
    """The status as last written."""
    history: PodHistory = field(default_factory=PodHistory)
    refusal: PodRefusal | None = None
    clock: SilenceClock = field(default_factory=SilenceClock)

    @classmethod
    def of(cls, status: JobStatus, now: float) -> ServiceMemory:
        """Restore the memory from the status of an earlier operator."""
        refused = status.bookkeeping.refused
        refusal = PodRefusal(refused.reason, refused.message) if refused is not None else None
        return cls(status, PodHistory.of(status), refusal, SilenceClock().interrupted(now))


@dataclass(frozen=True)
class Observed:
    """The input of `plan`."""

    workers: tuple[ObservedWorker, ...]
    """Ordered by slot and attempt."""
    view: CoordinatorView
    written: JobStatus
    """The status as last written."""
    history: PodHistory
    projected: Projected = field(default_factory=Projected)
    refusal: PodRefusal | None = None
    stopping: bool = False
    invalid: str = ""
    """Error of the current spec."""
    profile: ProfileRequest | None = None
    """Open profile request."""
    healthy_since: float = float("-inf")
    """Start of this operator's uninterrupted operation."""

    @property
    def pods(self) -> tuple[Pod, ...]:
        """The pods, ordered by slot and attempt."""
        return tuple(worker.pod for worker in self.workers)


def observe(
    snapshot: Snapshot, view: CoordinatorView, memory: ServiceMemory, projected: Projected, now: float
) -> Observed:
    """Join what the cluster, the coordinator and the projections know. `memory` comes from `remember`."""
    request = snapshot.profile
    is_open = isinstance(request, ProfileRequest) and request.id not in projected.answered_profiles
    return Observed(
        workers=observed_workers(snapshot.pods, view, memory.history, memory.clock, now),
        view=view,
        written=memory.written,
        history=memory.history,
        projected=projected,
        refusal=memory.refusal,
        stopping=snapshot.stopping,
        invalid=snapshot.invalid,
        profile=request if isinstance(request, ProfileRequest) and is_open else None,
        healthy_since=memory.clock.healthy_since,
    )


def remember(memory: ServiceMemory, snapshot: Snapshot, view: CoordinatorView, now: float) -> ServiceMemory:
    """Add the observation to the memory."""
    history = memory.history.advance(snapshot, view, now, running=_runs(memory, snapshot))
    refusal = memory.refusal if missing_slots(snapshot.job, snapshot.pods) else None
    return replace(memory, history=history, refusal=refusal)


def observed_facts(
    before: ServiceMemory, memory: ServiceMemory, snapshot: Snapshot, view: CoordinatorView, now: float
) -> tuple[ServiceFact, ...]:
    """Return the facts that an observation shows, in order. `before`: the memory without it, `memory`: with it."""
    facts: list[ServiceFact] = []
    if failed := memory.history.failures_since(before.history):
        message = "a worker ended before it joined" + _exit_message(snapshot, failed[-1])
        facts.append(StartsFailed(now, len(failed), message))
    if view.current is not None:
        facts.append(GenerationAdopted(now, view.current))
    facts.append(FaultsInjected(now, snapshot.faults))
    pods_run = any(pod.phase == "Running" for pod in snapshot.pods)
    facts.append(PodsObserved(now, running=pods_run, suspended=memory.written.phase == "Suspended"))
    if _runs(memory, snapshot):
        workers = observed_workers(snapshot.pods, view, memory.history, memory.clock, now)
        alone = is_alone(workers)
        lost = (worker for worker in workers if fell_silent(worker, alone=alone))
        facts.append(NodesObserved(now, tuple(crashes(snapshot.pods)), silent_nodes(lost, workers)))
    if isinstance(snapshot.profile, InvalidRequest):
        facts.append(ProfileRefused(now, snapshot.profile.id, snapshot.profile.message))
    return tuple(facts)


def _runs(memory: ServiceMemory, snapshot: Snapshot) -> bool:
    """Return whether workers are wanted, so that a pod's end is a failure."""
    over = memory.written.phase in (*FINAL_PHASES, "Suspended")
    return not (snapshot.stopping or snapshot.job.spec.suspend or over)


def _exit_message(snapshot: Snapshot, identity: Identity) -> str:
    pod = next((pod for pod in snapshot.pods if (pod.slot, pod.attempt) == identity), None)
    said = (pod.message or pod.reason) if pod is not None else "its pod is gone, or was removed after it stayed silent"
    return f" (worker {identity[0]}): {said}"
