"""Supervisor of a local run: API server and kubelet for one machine and one job.

It holds the job, the pods, the status and the injected faults, and restarts the operator process, which owns no state:
killing it is a fault like any other. The supervisor opens the listening socket for agents once and passes it to each
operator process, so that the coordinator's address never changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import psutil

from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import EvaluationResult, StepRecord
from pretrain_operator.cluster import Event, InjectedFault, Pod
from pretrain_operator.local import parent_death
from pretrain_operator.local.control_channel import (
    LINE_LIMIT,
    OPERATOR_MESSAGE,
    ClusterView,
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
from pretrain_operator.local.pods import KILL_SECONDS, LocalPods, WorkerCommand, last_line, signal_all
from pretrain_operator.local.run_folder import RunFolder

FINAL_PHASES = ("Succeeded", "Failed")


class OperatorCrashed(Exception):
    """The operator process crashed repeatedly; the message names its log."""


class RunObserver(Protocol):
    """Observer of a run, for display and logs."""

    def step(self, record: StepRecord) -> None:
        """Receive a step, each once."""
        ...

    def evaluation(self, record: EvaluationResult) -> None:
        """Receive an evaluation or a sample, each once."""
        ...

    def event(self, event: Event) -> None:
        """Receive an event."""
        ...

    def status(self, status: JobStatus) -> None:
        """Receive the new status."""
        ...


@dataclass(frozen=True)
class SupervisorConfig:
    """Configuration of a supervisor. Commands are parameters, so that tests can replace them."""

    folder: RunFolder
    observer: RunObserver
    worker: Callable[[int, int, int], WorkerCommand]
    """(slot, attempt, port of the coordinator) -> command of the worker."""
    operator: tuple[str, ...] = (sys.executable, "-m", "pretrain_operator.local")
    clock: Callable[[], float] = time.time
    crashes: int = 5
    """Unexpected exits of the operator process within `crash_window` seconds that end the run."""
    crash_window: float = 30.0


@dataclass
class Supervisor:
    """One local run. `run` returns when the job has ended or was stopped, and leaves no process behind."""

    config: SupervisorConfig
    job: PretrainJob
    status: JobStatus
    faults: tuple[InjectedFault, ...] = ()
    stopping: bool = False
    profile: str = ""
    _epoch: int = 0
    _operator: asyncio.subprocess.Process | None = None
    _channel: asyncio.StreamWriter | None = None
    _crashes: deque[float] = field(default_factory=deque[float])
    _expected_death: bool = False

    def __post_init__(self) -> None:
        self._agents = socket.create_server(("127.0.0.1", 0), backlog=128)
        port: int = self._agents.getsockname()[1]
        self._pods = LocalPods(
            lambda slot, attempt: self.config.worker(slot, attempt, port), self.config.clock, self._push
        )

    async def run(self) -> JobStatus:
        """Run the job to its end. Raises OperatorCrashed. All processes are gone afterwards in every case."""
        try:
            while not await self._run_operator():
                self._count_crash()
        finally:
            await self._end_all()
        return self.status

    @property
    def pods(self) -> tuple[Pod, ...]:
        """Current pods."""
        return self._pods.pods

    def stop(self) -> None:
        """Stop the run with a checkpoint."""
        self.stopping = True
        self._push()

    def poll_requests(self) -> None:
        """Take the request that `pretrain profile` left in the run's folder."""
        if request := self.config.folder.take_request():
            self.profile = request
            self._push()

    def scale(self, replicas: int, description: str) -> None:
        """Set the number of workers, as the scale subresource does."""
        workers = self.job.spec.workers.model_copy(update={"replicas": replicas})
        self.job = self.job.model_copy(update={"spec": self.job.spec.model_copy(update={"workers": workers})})
        self.inject(description, None, (), None)

    def processes(self, slot: int) -> tuple[psutil.Process, ...]:
        """Return the live worker of a slot, agent first; empty: none."""
        return self._pods.processes(slot)

    def inject(
        self,
        description: str,
        slot: int | None,
        processes: Sequence[psutil.Process],
        number: signal.Signals | None,
    ) -> None:
        """Signal the processes as a fault, recorded with its time in the report."""
        self.faults = (*self.faults, InjectedFault(self.config.clock(), slot, description))
        if number is not None:
            signal_all(tuple(processes), number)
        self._push()
        self.config.observer.event(Event("Warning", "FaultInjected", description))

    def kill_operator(self, description: str) -> bool:
        """Kill the operator process as a fault; False: none is running."""
        if self._operator is None or self._operator.returncode is not None:
            return False
        self._expected_death = True
        self.inject(description, None, (psutil.Process(self._operator.pid),), signal.SIGKILL)
        return True

    async def _run_operator(self) -> bool:
        """Run one operator process until it exits. True: the run is over; False: it crashed."""
        self._epoch += 1
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=LINE_LIMIT)
        with theirs, (self.config.folder.logs / "operator.log").open("ab") as log:
            descriptors = (theirs.fileno(), self._agents.fileno())
            self._operator = await asyncio.create_subprocess_exec(
                *parent_death.command([*self.config.operator, *map(str, descriptors), str(self._epoch)]),
                pass_fds=descriptors,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ,
                start_new_session=True,
            )
        self._channel = writer
        write_message(writer, self._view(self.status))
        try:
            while (message := await read_message(reader, OPERATOR_MESSAGE)) is not None:
                await self._answer(message, writer)
        finally:
            self._channel = None
            writer.close()
        return await self._operator.wait() == 0 and (self.stopping or self.status.phase in FINAL_PHASES)

    async def _answer(
        self,
        message: CreatePodRequest | DeletePodRequest | WriteStatus | Emit | RecordStep | RecordEvaluation,
        writer: asyncio.StreamWriter,
    ) -> None:
        match message:
            case CreatePodRequest():
                write_message(writer, RequestResult(id=message.id, error=await self._create(message)))
            case DeletePodRequest():
                self._pods.delete(message.slot, message.attempt, message.grace_seconds)
                write_message(writer, RequestResult(id=message.id))
            case WriteStatus():
                self.status = message.status
                self.config.folder.write_status(message.status)
                self.config.observer.status(message.status)
            case Emit():
                self.config.observer.event(Event(message.type, message.reason, message.message))
            case RecordStep():
                if self.config.folder.append_step(message.record):
                    self.config.observer.step(message.record)
            case RecordEvaluation():
                if self.config.folder.append_evaluation(message.record):
                    self.config.observer.evaluation(message.record)

    async def _create(self, message: CreatePodRequest) -> str:
        try:
            await self._pods.create(message.slot, message.attempt)
        except OSError as error:
            return f"worker {message.slot} cannot be started: {error}"
        return ""

    def _view(self, status: JobStatus | None = None) -> ClusterView:
        return ClusterView(
            job=self.job,
            pods=self._pods.pods,
            faults=self.faults,
            stopping=self.stopping,
            profile=self.profile,
            status=status,
        )

    def _push(self) -> None:
        if self._channel is not None:
            write_message(self._channel, self._view())

    def _count_crash(self) -> None:
        if self._expected_death:
            self._expected_death = False
            return
        now = self.config.clock()
        self._crashes.append(now)
        while self._crashes[0] < now - self.config.crash_window:
            self._crashes.popleft()
        log = self.config.folder.logs / "operator.log"
        said = f"{last_line(log)} (see {log})"
        if len(self._crashes) >= self.config.crashes:
            raise OperatorCrashed(f"the operator process crashed {len(self._crashes)} times in a row: {said}")
        self.config.observer.event(
            Event("Warning", "OperatorRestarted", f"restarting the crashed operator process: {said}")
        )

    async def _end_all(self) -> None:
        if self._operator is not None and self._operator.returncode is None:
            self._operator.kill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KILL_SECONDS):
                    await self._operator.wait()
        await self._pods.end_all()
        self._agents.close()
