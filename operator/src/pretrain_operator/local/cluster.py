"""The `Cluster` port of a local run, over the control channel."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Callable

from pretrain_api.messages.profile_request import read_request
from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import EvaluationResult, StepRecord
from pretrain_operator.cluster import Event, Placement, Pod, Snapshot
from pretrain_operator.local.control_channel import (
    LINE_LIMIT,
    SUPERVISOR_MESSAGE,
    ClusterView,
    ControlMessage,
    CreatePodRequest,
    DeletePodRequest,
    Emit,
    RecordEvaluation,
    RecordStep,
    RequestResult,
    WriteStatus,
    read_message,
    write_message,
)


class LocalCluster:
    """Local processes in place of pods. Create it with `connect`, and keep `run` running."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: ClusterView) -> None:
        self._reader = reader
        self._writer = writer
        self._view = first
        self._status = first.status or JobStatus()
        self._ids = itertools.count(1)
        self._unanswered: dict[int, asyncio.Future[RequestResult]] = {}
        self._subscribers: list[Callable[[], None]] = []
        self._closed = False

    @classmethod
    async def connect(cls, channel: socket.socket) -> LocalCluster:
        """Connect to the supervisor; returns with its first view."""
        reader, writer = await asyncio.open_unix_connection(sock=channel, limit=LINE_LIMIT)
        first = await read_message(reader, SUPERVISOR_MESSAGE)
        if not isinstance(first, ClusterView):
            raise ConnectionError("the supervisor closed the control channel before its first view")
        return cls(reader, writer, first)

    async def run(self) -> None:
        """Receive messages until the supervisor closes the channel."""
        while (message := await read_message(self._reader, SUPERVISOR_MESSAGE)) is not None:
            match message:
                case ClusterView():
                    self._view = message
                    for changed in self._subscribers:
                        changed()
                case RequestResult():
                    if not (waiting := self._unanswered.pop(message.id)).done():
                        waiting.set_result(message)
        self._closed = True
        for waiting in self._unanswered.values():
            if not waiting.done():
                waiting.set_exception(ConnectionError("the supervisor closed the control channel"))

    async def snapshot(self) -> Snapshot:
        """Return the latest view, with the status that this process wrote last. A local run has no TTL."""
        view = self._view
        spec = view.job.spec.model_copy(update={"ttl_after_finished": None})
        job = view.job.model_copy(update={"spec": spec})
        return Snapshot(job, self._status, view.pods, view.faults, view.stopping, profile=read_request(view.profile))

    async def create_pod(self, slot: int, attempt: int, placement: Placement) -> None:
        """Start a worker; succeeds if it exists."""
        await self._ask(CreatePodRequest(id=next(self._ids), slot=slot, attempt=attempt))

    async def delete_pod(self, pod: Pod, grace_seconds: float) -> None:
        """Stop a worker; succeeds if it is gone."""
        request = DeletePodRequest(id=next(self._ids), slot=pod.slot, attempt=pod.attempt, grace_seconds=grace_seconds)
        await self._ask(request)

    async def delete_job(self) -> None:
        """Do nothing: the run's folder belongs to the user."""

    async def write_status(self, status: JobStatus) -> None:
        """Replace the job's status."""
        self._status = status
        await self._say(WriteStatus(status=status))

    async def emit(self, event: Event) -> None:
        """Report an event to the user."""
        await self._say(Emit(type=event.type, reason=event.reason, message=event.message))

    def record_step(self, record: StepRecord) -> None:
        """Append a step to `metrics.jsonl` and show it."""
        write_message(self._writer, RecordStep(record=record))

    def record_evaluation(self, record: EvaluationResult) -> None:
        """Append an evaluation or a sample to its file and show it."""
        write_message(self._writer, RecordEvaluation(record=record))

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Call `changed` on every new view."""
        self._subscribers.append(changed)

    async def close(self) -> None:
        """Flush and close the channel."""
        self._writer.close()
        await self._writer.wait_closed()

    async def _say(self, message: ControlMessage) -> None:
        write_message(self._writer, message)
        await self._writer.drain()

    async def _ask(self, request: CreatePodRequest | DeletePodRequest) -> None:
        if self._closed:
            raise ConnectionError("the supervisor closed the control channel")
        answer: asyncio.Future[RequestResult] = asyncio.get_running_loop().create_future()
        self._unanswered[request.id] = answer
        await self._say(request)
        if error := (await answer).error:
            raise OSError(error)
