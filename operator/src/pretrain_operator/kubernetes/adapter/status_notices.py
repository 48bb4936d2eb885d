"""Conditions of a job without a running service: InvalidSpec and InternalError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pretrain_api.status.job import Condition, JobStatus
from pretrain_operator.decide.conditions import condition_of, with_condition
from pretrain_operator.kubernetes.adapter.job_record import without_nan
from pretrain_operator.kubernetes.client.api import JOBS, Api, ApiError, Object
from pretrain_operator.kubernetes.workload.validation import parse_status

NoticeKind = Literal["InvalidSpec", "InternalError"]
KINDS: tuple[NoticeKind, ...] = ("InvalidSpec", "InternalError")


def invalid_spec(status: JobStatus, body: Object, message: str, now: float) -> JobStatus:
    """Set InvalidSpec: there is no valid spec, and the job waits for its user."""
    waiting = status.model_copy(update={"phase": "Pending", "reason": "InvalidSpec", "message": message})
    return _with(waiting, "InvalidSpec", body, message, now)


def internal_error(status: JobStatus, body: Object, message: str, now: float) -> JobStatus:
    """Set InternalError: serving the job failed by a bug and is retried. The phase stays."""
    return _with(status, "InternalError", body, message, now)


def cleared(status: JobStatus, body: Object, now: float) -> JobStatus:
    """Clear both conditions where they are set."""
    for kind in KINDS:
        condition = condition_of(status.conditions, kind)
        if condition is not None and condition.status == "True":
            over = Condition(type=kind, status="False", reason="Served", observed_generation=_generation(body))
            status = status.model_copy(update={"conditions": with_condition(status.conditions, over, now)})
    return status


async def fetch_current(api: Api, body: Object) -> Object:
    """Return the current job. Raises ApiError; `NotFound` also if the name belongs to another job."""
    metadata = body["metadata"]
    current = await api.get(JOBS, metadata["namespace"], metadata["name"])
    if current["metadata"]["uid"] != metadata["uid"]:
        raise ApiError(404, "NotFound", f"another job is named {metadata['name']}")
    return current


async def write_notice(api: Api, body: Object, change: Callable[[JobStatus, Object], JobStatus]) -> Object:
    """Change the job's status, writing only a difference; returns the job after it. Raises ApiError."""
    metadata = body["metadata"]
    latest = await fetch_current(api, body)
    before = parse_status(latest)
    after = change(before, latest)
    if after == before:
        return latest
    changed = {**latest, "status": without_nan(after.model_dump(mode="python", by_alias=True, exclude_none=True))}
    return await api.replace(JOBS, metadata["namespace"], metadata["name"], changed, subresource="status")


def _with(status: JobStatus, kind: NoticeKind, body: Object, message: str, now: float) -> JobStatus:
    condition = Condition(type=kind, status="True", reason=kind, message=message, observed_generation=_generation(body))
    return status.model_copy(update={"conditions": with_condition(status.conditions, condition, now)})


def _generation(body: Object) -> int:
    return body["metadata"].get("generation", 0)
