"""The phase of a job and its reason: an ordered chain of policies. The first match wins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import Phase
from pretrain_operator.decide.observe import Observed
from pretrain_operator.decide.obstacles import stopping_obstacle
from pretrain_operator.decide.sizing import min_members, replica_quantum

EndReason = Literal["succeeded", "failed", "suspended"]
END_REASONS: dict[Phase, EndReason] = {"Succeeded": "succeeded", "Failed": "failed", "Suspended": "suspended"}


@dataclass(frozen=True)
class LifecycleVerdict:
    """The verdict of a policy."""

    phase: Phase
    reason: str
    message: str
    runs: bool = True
    """Workers are wanted."""
    end: EndReason | None = None
    """Reason for shutting down the agents, once the verdict is written."""


Policy = Callable[[PretrainJob, Observed, float], LifecycleVerdict | None]


def lifecycle(job: PretrainJob, observed: Observed, now: float) -> LifecycleVerdict:
    """Return the first verdict of the chain."""
    return next(verdict for policy in POLICIES if (verdict := policy(job, observed, now)) is not None)


def ended(_job: PretrainJob, observed: Observed, _now: float) -> LifecycleVerdict | None:
    """Keep a written end: it is final."""
    written = observed.written
    if written.phase not in ("Succeeded", "Failed"):
        return None
    return _end(written.phase, written.reason, written.message)


def finished(_job: PretrainJob, observed: Observed, _now: float) -> LifecycleVerdict | None:
    """Succeed once the last step is completed and its checkpoint committed."""
    done = observed.view.finished
    if done is None:
        return None
    return _end("Succeeded", "Completed", f"completed {done.step} steps")


def failed(_job: PretrainJob, observed: Observed, _now: float) -> LifecycleVerdict | None:
    """Fail on a failure that no restart can fix, or that a rule of the job makes final."""
    if (fatal := observed.view.fatal) is not None:
        return _end("Failed", fatal.reason, fatal.message or f"rank {fatal.rank} failed")
    if observed.projected.fatal:
        return _end("Failed", "FailedByRule", observed.projected.fatal)
    return None


def exhausted(job: PretrainJob, observed: Observed, now: float) -> LifecycleVerdict | None:
    """Fail once the failure budget is spent without progress."""
    message = observed.projected.spent.exhausted(job.spec.recovery.budget, now)
    return _end("Failed", "BudgetExhausted", message) if message else None


def stopping(_job: PretrainJob, observed: Observed, _now: float) -> LifecycleVerdict | None:
    """Stop on the user's request: a checkpoint first, then the workers terminate."""
    if not observed.stopping:
        return None
    if _trains(observed):
        return LifecycleVerdict("Holding", "Stopping", "taking a checkpoint, then stopping", runs=False)
    return _end("Suspended", "Stopped", "stopped by the user; the same command resumes it")


def suspended(job: PretrainJob, observed: Observed, _now: float) -> LifecycleVerdict | None:
    """Suspend while `spec.suspend` is true: a checkpoint first, then the workers terminate."""
    if not job.spec.suspend:
        return None
    if _trains(observed):
        return LifecycleVerdict(
            "Holding", "Suspending", "taking a checkpoint, then terminating the workers", runs=False
        )
    return _end("Suspended", "Suspended", "spec.suspend is true")


def blocked(job: PretrainJob, observed: Observed, _now: float) -> LifecycleVerdict | None:
    """Report an obstacle that the user or the cluster must remove before any worker can train."""
    obstacle = stopping_obstacle(job, observed)
    if obstacle is None:
        return None
    recovers = observed.projected.recovering or observed.projected.state == "recovering"
    return LifecycleVerdict("Recovering" if recovers else "Pending", obstacle.reason, obstacle.message)


def training(job: PretrainJob, observed: Observed, _now: float) -> LifecycleVerdict | None:
    """Report training while steps advance."""
    if observed.projected.state not in ("training", "redoing", "evaluating", "saving") or observed.view.current is None:
        return None
    message = f"{_members(observed)} of {job.spec.workers.replicas} workers are training"
    if replica_quantum(job) > 1 and _members(observed) < job.spec.workers.replicas:
        message += f"; a replica of the model needs {replica_quantum(job)} workers, surplus workers wait"
    return LifecycleVerdict("Training", "Training", message)


def recovering(job: PretrainJob, observed: Observed, _now: float) -> LifecycleVerdict | None:
    """Report the recovery from a fault."""
    if not observed.projected.recovering:
        return None
    connected, needed = sum(agent.connected for agent in observed.view.agents), min_members(job)
    if observed.view.current is None and connected < needed:
        message = f"waiting for workers: {connected} of at least {needed} are connected"
        return LifecycleVerdict("Recovering", observed.projected.recovering, message)
    return LifecycleVerdict(
        "Recovering", observed.projected.recovering, "resuming from the latest checkpoint with the available workers"
    )


def holding(_job: PretrainJob, observed: Observed, _now: float) -> LifecycleVerdict | None:
    """Report a planned change while ranks hold between two generations."""
    if observed.projected.state != "holding":
        return None
    return LifecycleVerdict("Holding", "Resizing", "holding at a step boundary for the next generation")


def starting(job: PretrainJob, observed: Observed, _now: float) -> LifecycleVerdict | None:
    """Report the start while workers run and join."""
    if not any(worker.pod.phase == "Running" for worker in observed.workers):
        return None
    joined = sum(agent.connected for agent in observed.view.agents)
    if observed.view.current is not None:
        return LifecycleVerdict("Starting", "RanksStarting", f"{_members(observed)} workers are starting their ranks")
    return LifecycleVerdict(
        "Starting", "WorkersJoining", f"{joined} of {job.spec.workers.replicas} workers have joined"
    )


def pending(job: PretrainJob, _observed: Observed, _now: float) -> LifecycleVerdict | None:
    """Report that no worker runs."""
    return LifecycleVerdict("Pending", "WaitingForWorkers", f"0 of {job.spec.workers.replicas} workers are running")


POLICIES: tuple[Policy, ...] = (
    ended, finished, failed, exhausted, stopping, suspended, blocked, training, recovering, holding, starting, pending,
)  # fmt: skip


def _end(phase: Literal["Succeeded", "Failed", "Suspended"], reason: str, message: str) -> LifecycleVerdict:
    return LifecycleVerdict(phase, reason, message, runs=False, end=END_REASONS[phase])


def _trains(observed: Observed) -> bool:
    """Return whether an end now would lose steps."""
    return observed.view.current is not None and not observed.view.holding


def _members(observed: Observed) -> int:
    return len(observed.view.current.members) if observed.view.current is not None else 0
