"""What phase a job is in, and why: an ordered chain of policies of which the first that matches wins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import Phase
from pretrain_operator.decide.observe import Observed, fewest, unit
from pretrain_operator.decide.obstacles import what_stops

EndReason = Literal["succeeded", "failed", "suspended"]


@dataclass(frozen=True)
class Verdict:
    """What a policy says."""

    phase: Phase
    reason: str
    message: str
    runs: bool = True
    """Workers are wanted."""
    end: EndReason | None = None
    """With this the agents are let go, once the verdict is written."""


Policy = Callable[[PretrainJob, Observed, float], Verdict | None]


def lifecycle(job: PretrainJob, seen: Observed, now: float) -> Verdict:
    """The first verdict of the chain."""
    return next(verdict for policy in POLICIES if (verdict := policy(job, seen, now)) is not None)


def ended(_job: PretrainJob, seen: Observed, _now: float) -> Verdict | None:
    """What was written as ended stays so."""
    written = seen.written
    if written.phase not in ("Succeeded", "Failed"):
        return None
    end = "succeeded" if written.phase == "Succeeded" else "failed"
    return Verdict(written.phase, written.reason, written.message, runs=False, end=end)


def finished(_job: PretrainJob, seen: Observed, _now: float) -> Verdict | None:
    """The last step is done and its checkpoint in force."""
    done = seen.view.finished
    if done is None:
        return None
    return Verdict("Succeeded", "Completed", f"{done.step} steps are done", runs=False, end="succeeded")


def failed(_job: PretrainJob, seen: Observed, _now: float) -> Verdict | None:
    """A failure that no restart can mend, or that a rule of the job calls so."""
    if (fatal := seen.view.fatal) is not None:
        return Verdict("Failed", fatal.reason, fatal.message or f"rank {fatal.rank} failed", runs=False, end="failed")
    if seen.fatal:
        return Verdict("Failed", "FailedByRule", seen.fatal, runs=False, end="failed")
    return None


def exhausted(job: PretrainJob, seen: Observed, now: float) -> Verdict | None:
    """It failed too often without progress."""
    message = seen.spent.exhausted(job.spec.recovery.budget, now)
    return Verdict("Failed", "BudgetExhausted", message, runs=False, end="failed") if message else None


def stopping(_job: PretrainJob, seen: Observed, _now: float) -> Verdict | None:
    """The user wants the end: first a checkpoint, then the workers go."""
    if not seen.stopping:
        return None
    if _trains(seen):
        return Verdict("Holding", "Stopping", "takes a checkpoint, then stops", runs=False)
    return Verdict("Suspended", "Stopped", "stopped by the user; the same command resumes", runs=False, end="suspended")


def suspended(job: PretrainJob, seen: Observed, _now: float) -> Verdict | None:
    """`spec.suspend` is set."""
    if not job.spec.suspend:
        return None
    if _trains(seen):
        return Verdict("Holding", "Suspending", "takes a checkpoint, then lets the workers go", runs=False)
    return Verdict("Suspended", "Suspended", "spec.suspend is true", runs=False, end="suspended")


def blocked(job: PretrainJob, seen: Observed, _now: float) -> Verdict | None:
    """Nobody can train until somebody mends something."""
    obstacle = what_stops(job, seen)
    if obstacle is None:
        return None
    recovers = seen.recovering or seen.state == "recovering"
    return Verdict("Recovering" if recovers else "Pending", obstacle.reason, obstacle.message)


def training(job: PretrainJob, seen: Observed, _now: float) -> Verdict | None:
    """Steps are being done."""
    if seen.state not in ("training", "redoing", "evaluating", "saving") or seen.view.current is None:
        return None
    message = f"{_members(seen)} of {job.spec.workers.replicas} workers train"
    if unit(job) > 1 and _members(seen) < job.spec.workers.replicas:
        message += f"; a replica of the model takes {unit(job)}, and workers beyond whole replicas wait"
    return Verdict("Training", "Training", message)


def recovering(job: PretrainJob, seen: Observed, _now: float) -> Verdict | None:
    """A fault is being overcome."""
    if not seen.recovering:
        return None
    there, needed = sum(agent.connected for agent in seen.view.agents), fewest(job)
    if seen.view.current is None and there < needed:
        message = f"{there} of the at least {needed} workers that it needs are there"
        return Verdict("Recovering", seen.recovering, message)
    return Verdict("Recovering", seen.recovering, "goes on from the newest checkpoint with the workers there are")


def holding(_job: PretrainJob, seen: Observed, _now: float) -> Verdict | None:
    """Between two generations, on purpose."""
    if seen.state != "holding":
        return None
    return Verdict("Holding", "Resizing", "waits at a step boundary for the next generation")


def starting(job: PretrainJob, seen: Observed, _now: float) -> Verdict | None:
    """Workers are there or coming."""
    if not any(worker.pod.phase == "Running" for worker in seen.workers):
        return None
    joined = sum(agent.connected for agent in seen.view.agents)
    if seen.view.current is not None:
        return Verdict("Starting", "RanksStarting", f"{_members(seen)} workers start their ranks")
    return Verdict("Starting", "WorkersJoining", f"{joined} of {job.spec.workers.replicas} workers have joined")


def pending(job: PretrainJob, _seen: Observed, _now: float) -> Verdict | None:
    """No worker runs yet."""
    return Verdict("Pending", "WaitingForWorkers", f"0 of {job.spec.workers.replicas} workers run")


POLICIES: tuple[Policy, ...] = (
    ended, finished, failed, exhausted, stopping, suspended, blocked, training, recovering, holding, starting, pending,
)  # fmt: skip


def _trains(seen: Observed) -> bool:
    """There are steps that would be lost."""
    return seen.view.current is not None and not seen.view.holding


def _members(seen: Observed) -> int:
    return len(seen.view.current.members) if seen.view.current is not None else 0
