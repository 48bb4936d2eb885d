"""What a job's status says while no service runs for it: that its spec is in error, or that the operator is."""

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


def invalid(status: JobStatus, body: Object, message: str, now: float) -> JobStatus:
    """The spec cannot be acted on, and there was no earlier one that could: the job waits for its user."""
    waiting = status.model_copy(update={"phase": "Pending", "reason": "InvalidSpec", "message": message})
    return _with(waiting, "InvalidSpec", body, message, now)


def broken(status: JobStatus, body: Object, message: str, now: float) -> JobStatus:
    """The operator met a bug of its own in serving this job, and will try again; the job's phase stays as it is."""
    return _with(status, "InternalError", body, message, now)


def lifted(status: JobStatus, body: Object, now: float) -> JobStatus:
    """What kept the job from being served is over; a status that said nothing of the kind stays as it is."""
    for kind in KINDS:
        condition = condition_of(status.conditions, kind)
        if condition is not None and condition.status == "True":
            over = Condition(type=kind, status="False", reason="Served", observed_generation=_generation(body))
            status = status.model_copy(update={"conditions": with_condition(status.conditions, over, now)})
    return status


async def newest(api: Api, body: Object) -> Object:
    """The job as it is now. Raises ApiError, `NotFound` also where another job has its name."""
    metadata = body["metadata"]
    current = await api.get(JOBS, metadata["namespace"], metadata["name"])
    if current["metadata"]["uid"] != metadata["uid"]:
        raise ApiError(404, "NotFound", f"another job is named {metadata['name']}")
    return current


async def write_notice(api: Api, body: Object, change: Callable[[JobStatus, Object], JobStatus]) -> Object:
    """Change the job's status, with a write only if that changes anything; returns the job as it then is. Raises
    ApiError."""
    metadata = body["metadata"]
    current = await newest(api, body)
    before = parse_status(current)
    after = change(before, current)
    if after == before:
        return current
    changed = {**current, "status": without_nan(after.model_dump(mode="python", by_alias=True, exclude_none=True))}
    return await api.replace(JOBS, metadata["namespace"], metadata["name"], changed, subresource="status")


def _with(status: JobStatus, kind: NoticeKind, body: Object, message: str, now: float) -> JobStatus:
    condition = Condition(type=kind, status="True", reason=kind, message=message, observed_generation=_generation(body))
    return status.model_copy(update={"conditions": with_condition(status.conditions, condition, now)})


def _generation(body: Object) -> int:
    return body["metadata"].get("generation", 0)
