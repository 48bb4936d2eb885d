"""The control channel between the supervisor and the operator process: JSON lines over a Unix socket pair.

The supervisor is what the API server and the kubelet are on Kubernetes. It pushes a `View` whenever something changed
and answers each `CreatePod` and `DeletePod` after the view that shows its effect. The status travels towards the
operator in the first view only: later the operator itself is its one writer.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal, TypeVar

from pydantic import Field, TypeAdapter

from pretrain_api.base import Wire
from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import Appraisal, StepRecord
from pretrain_operator.cluster import InjectedFault, Pod

LINE_LIMIT = 2**26
"""Bytes of the longest message: a job with a large pod template and a status with many incidents fit."""

T = TypeVar("T")


# --- supervisor to operator ------------------------------------------------------------------------------------------


class View(Wire):
    """What the cluster holds now."""

    kind: Literal["view"] = "view"
    job: PretrainJob
    pods: tuple[Pod, ...]
    faults: tuple[InjectedFault, ...]
    stopping: bool
    profile: str = Field(default="", description="The newest request for a profile, as `read_request` reads it")
    status: JobStatus | None = Field(default=None, description="In the first view of a channel only")


class Answer(Wire):
    """The request with this id was carried out, or not: why."""

    kind: Literal["answer"] = "answer"
    id: int
    error: str = ""


SupervisorMessage = Annotated[View | Answer, Field(discriminator="kind")]
SUPERVISOR_MESSAGE: TypeAdapter[SupervisorMessage] = TypeAdapter(SupervisorMessage)


# --- operator to supervisor ------------------------------------------------------------------------------------------


class CreatePod(Wire):
    """Start a worker."""

    kind: Literal["create_pod"] = "create_pod"
    id: int
    slot: int
    attempt: int


class DeletePod(Wire):
    """End a worker: SIGTERM, and SIGKILL after the grace."""

    kind: Literal["delete_pod"] = "delete_pod"
    id: int
    slot: int
    attempt: int
    grace_seconds: float


class WriteStatus(Wire):
    """Replace the job's status."""

    kind: Literal["status"] = "status"
    status: JobStatus


class Emit(Wire):
    """Tell the user what happened."""

    kind: Literal["event"] = "event"
    type: Literal["Normal", "Warning"]
    reason: str
    message: str


class RecordStep(Wire):
    """A step was done: a line of `metrics.jsonl`."""

    kind: Literal["step"] = "step"
    record: StepRecord


class RecordAppraisal(Wire):
    """The model was evaluated or wrote a text: a line of `evaluations.jsonl` or `samples.jsonl`."""

    kind: Literal["appraisal"] = "appraisal"
    record: Appraisal


OperatorMessage = Annotated[
    CreatePod | DeletePod | WriteStatus | Emit | RecordStep | RecordAppraisal, Field(discriminator="kind")
]
OPERATOR_MESSAGE: TypeAdapter[OperatorMessage] = TypeAdapter(OperatorMessage)


def write_message(writer: asyncio.StreamWriter, message: Wire) -> None:
    """Queue a message; a channel whose peer is gone swallows it, since the reader's end is what tells of that."""
    if not writer.is_closing():
        writer.write(message.to_json().encode() + b"\n")


async def read_message(reader: asyncio.StreamReader, kinds: TypeAdapter[T]) -> T | None:
    """The next message, or None at the end of the channel, a half-written last line included."""
    try:
        line = await reader.readline()
    except ConnectionError:
        return None
    return kinds.validate_json(line) if line.endswith(b"\n") else None
