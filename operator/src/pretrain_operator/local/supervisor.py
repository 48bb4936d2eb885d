"""The supervisor of a local run: what the API server and the kubelet are on Kubernetes, for one machine and one job.

It holds the job, the pods, the status and the faults, and keeps an operator process running beside them: killing that
one is a fault like any other, since it owns nothing. The socket on which agents find the coordinator is opened here,
once, and handed to each operator process, so that its address survives them all.
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
from pretrain_api.status.records import Appraisal, StepRecord
from pretrain_operator.cluster import Event, InjectedFault, Pod
from pretrain_operator.local import parent_death as tether
from pretrain_operator.local.control_channel import (
    LINE_LIMIT,
    OPERATOR_MESSAGE,
    Answer,
    CreatePod,
    DeletePod,
    Emit,
    RecordAppraisal,
    RecordStep,
    View,
    WriteStatus,
    read_message,
    write_message,
)
from pretrain_operator.local.pods import KILL_SECONDS, LocalPods, WorkerCommand, last_line
from pretrain_operator.local.process_tree import signal_all
from pretrain_operator.local.run_folder import RunFolder

FINAL_PHASES = ("Succeeded", "Failed")


class OperatorCrashed(Exception):
    """The operator process ends again and again; the message says where its log is."""


class Audience(Protocol):
    """Whoever watches the run."""

    def step(self, record: StepRecord) -> None:
        """A step was done, each once."""
        ...

    def appraisal(self, record: Appraisal) -> None:
        """The model was evaluated or wrote a text, each once."""
        ...

    def event(self, event: Event) -> None:
        """Something happened."""
        ...

    def status(self, status: JobStatus) -> None:
        """The status was replaced."""
        ...


@dataclass(frozen=True)
class Setting:
    """What a supervisor works with. The commands are given, so that tests can run others in their place."""

    folder: RunFolder
    audience: Audience
    worker: Callable[[int, int, int], WorkerCommand]
    """(slot, attempt, port of the coordinator) -> how the worker is started."""
    operator: tuple[str, ...] = (sys.executable, "-m", "pretrain_operator.local")
    clock: Callable[[], float] = time.time
    crashes: int = 5
    """So many ends of the operator process within `crash_window` seconds, not injected, end the run."""
    crash_window: float = 30.0


@dataclass
class Supervisor:
    """One local run. `run` returns when the job has ended or has been stopped, with no process left behind."""

    setting: Setting
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
            lambda slot, attempt: self.setting.worker(slot, attempt, port), self.setting.clock, self._push
        )

    async def run(self) -> JobStatus:
        """Run the job to its end. Raises OperatorCrashed; whatever happens, all processes are gone afterwards."""
        try:
            while not await self._run_operator():
                self._count_crash()
        finally:
            await self._end_all()
        return self.status

    @property
    def pods(self) -> tuple[Pod, ...]:
        """The workers as they are now."""
        return self._pods.pods

    def stop(self) -> None:
        """Have a checkpoint taken and the run ended."""
        self.stopping = True
        self._push()

    def look_for_requests(self) -> None:
        """Take up what another process has asked for by a file in the run's folder: `pretrain profile`."""
        if request := self.setting.folder.take_request():
            self.profile = request
            self._push()

    def scale(self, replicas: int, description: str) -> None:
        """Want so many workers: the scale subresource."""
        workers = self.job.spec.workers.model_copy(update={"replicas": replicas})
        self.job = self.job.model_copy(update={"spec": self.job.spec.model_copy(update={"workers": workers})})
        self.inject(description, None, (), None)

    def processes(self, slot: int) -> tuple[psutil.Process, ...]:
        """The live worker of a slot: its agent, then all below it; empty when there is none."""
        return self._pods.processes(slot)

    def inject(
        self,
        description: str,
        slot: int | None,
        processes: Sequence[psutil.Process],
        number: signal.Signals | None,
    ) -> None:
        """Signal the processes as a fault that the report tells of, with its time."""
        self.faults = (*self.faults, InjectedFault(self.setting.clock(), slot, description))
        if number is not None:
            signal_all(tuple(processes), number)
        self._push()
        self.setting.audience.event(Event("Warning", "FaultInjected", description))

    def kill_operator(self, description: str) -> bool:
        """SIGKILL the operator process, as a fault; False: there is none just now."""
        if self._operator is None or self._operator.returncode is not None:
            return False
        self._expected_death = True
        self.inject(description, None, (psutil.Process(self._operator.pid),), signal.SIGKILL)
        return True

    async def _run_operator(self) -> bool:
        """Run one operator process to its end. True: it ended the run; False: it died."""
        self._epoch += 1
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=LINE_LIMIT)
        with theirs, (self.setting.folder.logs / "operator.log").open("ab") as log:
            descriptors = (theirs.fileno(), self._agents.fileno())
            self._operator = await asyncio.create_subprocess_exec(
                *tether.command([*self.setting.operator, *map(str, descriptors), str(self._epoch)]),
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
        message: CreatePod | DeletePod | WriteStatus | Emit | RecordStep | RecordAppraisal,
        writer: asyncio.StreamWriter,
    ) -> None:
        match message:
            case CreatePod():
                write_message(writer, Answer(id=message.id, error=await self._create(message)))
            case DeletePod():
                self._pods.delete(message.slot, message.attempt, message.grace_seconds)
                write_message(writer, Answer(id=message.id))
            case WriteStatus():
                self.status = message.status
                self.setting.folder.write_status(message.status)
                self.setting.audience.status(message.status)
            case Emit():
                self.setting.audience.event(Event(message.type, message.reason, message.message))
            case RecordStep():
                if self.setting.folder.append_step(message.record):
                    self.setting.audience.step(message.record)
            case RecordAppraisal():
                if self.setting.folder.append_appraisal(message.record):
                    self.setting.audience.appraisal(message.record)

    async def _create(self, message: CreatePod) -> str:
        try:
            await self._pods.create(message.slot, message.attempt)
        except OSError as error:
            return f"worker {message.slot} can't be started: {error}"
        return ""

    def _view(self, status: JobStatus | None = None) -> View:
        return View(
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
        now = self.setting.clock()
        self._crashes.append(now)
        while self._crashes[0] < now - self.setting.crash_window:
            self._crashes.popleft()
        log = self.setting.folder.logs / "operator.log"
        said = f"{last_line(log)} (see {log})"
        if len(self._crashes) >= self.setting.crashes:
            raise OperatorCrashed(f"the operator process ended {len(self._crashes)} times in a row: {said}")
        self.setting.audience.event(Event("Warning", "OperatorRestarted", f"the operator process ended: {said}"))

    async def _end_all(self) -> None:
        if self._operator is not None and self._operator.returncode is None:
            self._operator.kill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KILL_SECONDS):
                    await self._operator.wait()
        await self._pods.end_all()
        self._agents.close()
