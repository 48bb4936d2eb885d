"""Conditions as in metav1.Condition: one setter, which keeps the time of the last transition."""

from __future__ import annotations

from datetime import UTC, datetime

from pretrain_api.status.job import Condition


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
