"""Conditions of a job, as in metav1.Condition: one setter, which keeps the time of the last transition."""

from __future__ import annotations

from datetime import UTC, datetime

from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import Condition, Obstacle
from pretrain_operator.decide.lifecycle import LifecycleVerdict
from pretrain_operator.decide.observe import Observed
from pretrain_operator.decide.obstacles import INVALID_SPEC, combined, obstacles

BLOCKED = "Blocked"


def with_condition(conditions: tuple[Condition, ...], new: Condition, now: float) -> tuple[Condition, ...]:
    """Replace or add a condition. Its transition time changes only with its status."""
    old = condition_of(conditions, new.type)
    if old is not None and old.status == new.status:
        moment = old.last_transition_time
    else:
        moment = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    dated = new.model_copy(update={"last_transition_time": moment})
    if old is None:
        return (*conditions, dated)
    return tuple(dated if item.type == new.type else item for item in conditions)


def condition_of(conditions: tuple[Condition, ...], kind: str) -> Condition | None:
    """Return the condition of this type, or None."""
    return next((item for item in conditions if item.type == kind), None)


def seconds_true(conditions: tuple[Condition, ...], kind: str, now: float) -> float | None:
    """Seconds since the condition became true; None: it is not true."""
    condition = condition_of(conditions, kind)
    if condition is None or condition.status != "True":
        return None
    return now - datetime.fromisoformat(condition.last_transition_time).timestamp()


def job_conditions(
    job: PretrainJob, observed: Observed, verdict: LifecycleVerdict, now: float
) -> tuple[Condition, ...]:
    """Return the conditions: `Training` and `Degraded` always, others once they were true."""
    members = len(observed.view.current.members) if observed.view.current is not None else 0
    wanted = job.spec.workers.replicas
    degraded = verdict.runs and (verdict.phase == "Recovering" or (verdict.phase == "Training" and members < wanted))
    obstacle = _obstacle(job, observed, verdict)
    truths = {
        BLOCKED: obstacle is not None,
        "Training": verdict.phase == "Training",
        "Degraded": degraded,
        "Suspended": verdict.phase == "Suspended",
        "Complete": verdict.phase == "Succeeded",
        "Failed": verdict.phase == "Failed",
    }
    conditions = observed.written.conditions
    for kind, true in truths.items():
        if not true and kind not in ("Training", "Degraded") and condition_of(conditions, kind) is None:
            continue
        reason, message = verdict.reason, verdict.message
        if kind == "Degraded":
            reason = "FewerWorkers" if degraded else "AsWanted"
            message = f"{members} of {wanted} workers are training" if degraded else ""
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


def _obstacle(job: PretrainJob, observed: Observed, verdict: LifecycleVerdict) -> Obstacle | None:
    """Return the current obstacle. For a job that wants no workers, only an invalid spec is one."""
    if verdict.phase in ("Succeeded", "Failed"):
        return None
    found = obstacles(job, observed)
    return combined(found if verdict.runs else [item for item in found if item.reason == INVALID_SPEC])
