"""Control channel between the supervisor and the operator process: JSON lines over a Unix socket pair.

The supervisor takes the roles of API server and kubelet. It pushes a `ClusterView` after every change, and answers each
`CreatePodRequest` and `DeletePodRequest` after the view that shows its effect. Only the first view carries the status:
after that the operator is its single writer.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter

from pretrain_api.base import Frozen
from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import EvaluationResult, StepRecord
from pretrain_operator.cluster import InjectedFault, Pod

LINE_LIMIT = 2**26
"""Maximum bytes of a message; holds a large pod template and a status with many incidents."""

T = TypeVar("T")


# --- supervisor to operator ------------------------------------------------------------------------------------------


class ControlMessage(Frozen):
    """Message between two processes of one run, which trust each other. Ignores unknown fields."""

    model_config = ConfigDict(extra="ignore")


class ClusterView(ControlMessage):
    """State of the local cluster."""

    kind: Literal["view"] = "view"
    job: PretrainJob
    pods: tuple[Pod, ...]
    faults: tuple[InjectedFault, ...]
    stopping: bool
    profile: str = Field(default="", description="Latest profile request, in the format of `read_request`")
    status: JobStatus | None = Field(default=None, description="In the first view of a channel only")


class RequestResult(ControlMessage):
    """Result of a request; `error` is empty on success."""

    kind: Literal["answer"] = "answer"
    id: int
    error: str = ""


SupervisorMessage = Annotated[ClusterView | RequestResult, Field(discriminator="kind")]
SUPERVISOR_MESSAGE: TypeAdapter[SupervisorMessage] = TypeAdapter(SupervisorMessage)


# --- operator to supervisor ------------------------------------------------------------------------------------------


class CreatePodRequest(ControlMessage):
    """Start a worker."""

    kind: Literal["create_pod"] = "create_pod"
    id: int
    slot: int
    attempt: int


class DeletePodRequest(ControlMessage):
    """Stop a worker: SIGTERM, and SIGKILL after the grace period."""

    kind: Literal["delete_pod"] = "delete_pod"
    id: int
    slot: int
    attempt: int
    grace_seconds: float


class WriteStatus(ControlMessage):
    """Replace the job's status."""

    kind: Literal["status"] = "status"
    status: JobStatus


class Emit(ControlMessage):
    """Report an event to the user."""

    kind: Literal["event"] = "event"
    type: Literal["Normal", "Warning"]
    reason: str
    message: str


class RecordStep(ControlMessage):
    """Append a line to `metrics.jsonl`."""

    kind: Literal["step"] = "step"
    record: StepRecord


class RecordEvaluation(ControlMessage):
    """Append a line to `evaluations.jsonl` or `samples.jsonl`."""

    kind: Literal["appraisal"] = "appraisal"
    record: EvaluationResult


OperatorMessage = Annotated[
    CreatePodRequest | DeletePodRequest | WriteStatus | Emit | RecordStep | RecordEvaluation,
    Field(discriminator="kind"),
]
OPERATOR_MESSAGE: TypeAdapter[OperatorMessage] = TypeAdapter(OperatorMessage)


def write_message(writer: asyncio.StreamWriter, message: ControlMessage) -> None:
    """Queue a message; dropped if the peer is gone, which the reading side notices."""
    if not writer.is_closing():
        writer.write(message.to_json().encode() + b"\n")


async def read_message(reader: asyncio.StreamReader, kinds: TypeAdapter[T]) -> T | None:
    """Return the next message; None at the end of the channel, an incomplete last line included."""
    try:
        line = await reader.readline()
    except ConnectionError:
        return None
    return kinds.validate_json(line) if line.endswith(b"\n") else None
