"""`pretrain run`: a job from its file to its report, on this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

from rich.console import Console

from pretrain_api.messages.trainer_config import trainer_config
from pretrain_api.problems import InvalidJob
from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import Appraisal, StepRecord
from pretrain_cli.errors import BadInput
from pretrain_cli.inputs.faults import Fault
from pretrain_cli.inputs.prepare import Order, Prepared, prepare
from pretrain_cli.render.line_log import LineLog
from pretrain_cli.render.report import Result, write_outputs
from pretrain_cli.render.summary import summarise
from pretrain_cli.render.tensorboard import FOLDER, TensorBoard
from pretrain_cli.render.terminal import Terminal
from pretrain_cli.targets.fault_injection import Injector
from pretrain_cli.targets.previous_run import begin, is_complete, keep_job, refuse_other_job, wall_seconds
from pretrain_cli.targets.worker_command import THREADS, worker_command
from pretrain_operator.cluster import Event
from pretrain_operator.local.run_folder import FolderInUse, RunFolder, UnreadableStatus
from pretrain_operator.local.supervisor import OperatorCrashed, Supervisor, SupervisorConfig

REFRESH_SECONDS = 0.25
SAME_SECONDS = 0.3
"""The same signal so soon again is the same Ctrl-C: wrappers such as `timeout` pass on what the terminal sent too."""


class Exit(IntEnum):
    """Exit codes of `pretrain run`."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    STOPPED = 130


EXITS: dict[Result, Exit] = {"Succeeded": Exit.DONE, "Failed": Exit.FAILED, "Stopped": Exit.STOPPED}


@dataclass(frozen=True)
class Ending:
    """How a run ended. `at_once`: by a second Ctrl-C, with nothing waited for."""

    result: Result
    reason: str
    status: JobStatus
    at_once: bool = False


def run(order: Order) -> int:
    """Run a job and return the exit code; what was wrong with the input is printed."""
    try:
        prepared = prepare(order, os.environ)
        with RunFolder(prepared.out) as folder:
            return _run_in(folder, prepared)
    except (InvalidJob, BadInput, FolderInUse, UnreadableStatus) as problem:
        print(problem, file=sys.stderr)
        return Exit.BAD_INPUT


def _run_in(folder: RunFolder, prepared: Prepared) -> int:
    """The run in its locked folder."""
    job = prepared.job
    refuse_other_job(folder, job)
    status = folder.read_status()
    total = job.spec.training.total_steps
    before = wall_seconds(folder)
    if is_complete(status, total):
        print(f"{job.metadata.name} has done its {status.step:,} steps already; raise training.steps to go on.")
        return _finish(folder, job, Ending("Succeeded", status.reason, status), before)
    nan_steps = tuple(fault.step for fault in prepared.faults if fault.action == "nan")
    config = trainer_config(job, status.job_uid, threads=THREADS, nan_steps=nan_steps)
    folder.trainer_config.write_text(config.to_json() + "\n")
    keep_job(folder, job)
    started = time.monotonic()
    console = Console()
    view = Terminal(console, time.time, job.metadata.name, total) if console.is_terminal else None
    with view or LineLog(sys.stdout, time.time, total) as audience:
        for note in prepared.notes:
            audience.note(note)
        with _board(folder, prepared) as board:
            ending = asyncio.run(_supervise(folder, prepared, begin(status, total), audience, board))
    return _finish(folder, job, ending, before + time.monotonic() - started)


def _finish(folder: RunFolder, job: PretrainJob, ending: Ending, seconds: float) -> int:
    """Write the outputs and say how it went."""
    hint = _resume_hint(ending.status)
    try:
        if ending.at_once:
            raise KeyboardInterrupt
        report = write_outputs(folder.path, job, ending.status, seconds, ending.result, ending.reason)
    except KeyboardInterrupt:
        print(f"Ended at once, without a report. {hint}")
        return Exit.STOPPED
    print(summarise(report, ending.status, folder.path))
    if ending.result == "Stopped":
        print(f"\nStopped. {hint}")
    return EXITS[ending.result]


def _resume_hint(status: JobStatus) -> str:
    if status.checkpoints.latest_step is None:
        return "No checkpoint was saved yet: the same command again starts anew."
    return f"Run the same command again to go on from step {status.checkpoints.latest_step:,}."


def _board(folder: RunFolder, prepared: Prepared) -> AbstractContextManager[TensorBoard | None]:
    return TensorBoard(folder.path / FOLDER) if prepared.tensorboard else nullcontext()


async def _supervise(
    folder: RunFolder,
    prepared: Prepared,
    status: JobStatus,
    audience: Terminal | LineLog,
    board: TensorBoard | None,
) -> Ending:
    """Run the job under a supervisor until it ends or the user ends it."""
    injecting = _Injecting(audience, board)
    setting = SupervisorConfig(folder, injecting, partial(worker_command, folder, prepared.job, status.job_uid))
    supervisor = Supervisor(setting, prepared.job, status)
    injecting.begin(supervisor, prepared.faults, status.step)
    running = asyncio.ensure_future(supervisor.run())
    interrupts = _Interrupts(supervisor, running, audience)
    beside = (asyncio.create_task(_redraw(audience)), asyncio.create_task(_take_requests(supervisor)))
    try:
        with interrupts:
            final = await running
    except OperatorCrashed as crash:
        return Ending("Failed", str(crash), supervisor.status)
    except asyncio.CancelledError:
        if not interrupts.at_once:
            raise
        return Ending("Stopped", "Ctrl-C, twice", supervisor.status, at_once=True)
    finally:
        for task in beside:
            task.cancel()
    injecting.report_missed()
    if final.phase == "Succeeded":
        return Ending("Succeeded", final.reason, final)
    if final.phase == "Failed":
        return Ending("Failed", f"{final.reason}: {final.message}" if final.message else final.reason, final)
    return Ending("Stopped", "stopped by the user", final)


async def _redraw(audience: Terminal | LineLog) -> None:
    while isinstance(audience, Terminal):
        audience.refresh()
        await asyncio.sleep(REFRESH_SECONDS)


async def _take_requests(supervisor: Supervisor) -> None:
    """Look now and then what `pretrain profile` has put into the folder."""
    while True:
        supervisor.poll_requests()
        await asyncio.sleep(REFRESH_SECONDS)


class _Interrupts:
    """Ctrl-C and SIGTERM while the run lasts: the first asks for a checkpoint and the end, the second ends at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(
        self, supervisor: Supervisor, running: asyncio.Future[JobStatus], audience: Terminal | LineLog
    ) -> None:
        self._supervisor = supervisor
        self._running = running
        self._audience = audience
        self._asked: tuple[signal.Signals, float] | None = None
        self.at_once = False

    def __enter__(self) -> None:
        for number in self.SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._interrupt, number)

    def __exit__(self, *_: object) -> None:
        for number in self.SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    def _interrupt(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._asked is not None:
            before, moment = self._asked
            if number != before or now - moment > SAME_SECONDS:
                self.at_once = True
                self._running.cancel()
            return
        self._asked = (number, now)
        self._supervisor.stop()
        message = "taking a checkpoint, then the run ends; Ctrl-C again ends it at once"
        self._audience.event(Event("Normal", "Stopping", message))


class _Injecting:
    """Passes on what happens, and injects the faults that are due."""

    def __init__(self, audience: Terminal | LineLog, board: TensorBoard | None) -> None:
        self._audience = audience
        self._board = board
        self._injector: Injector | None = None
        self._step = 0

    def begin(self, supervisor: Supervisor, faults: tuple[Fault, ...], step: int) -> None:
        """Inject into this run, which has done `step` steps before: faults up to there have been."""
        self._step = step
        for fault in faults:
            if fault.step <= step:
                self._audience.note(f"--fault {fault.text} is left out: step {step} is done already")
        self._injector = Injector([fault for fault in faults if fault.step > step], supervisor)

    def report_missed(self) -> None:
        """Say which faults found no target until the end."""
        for fault in self._injector.pending if self._injector else ():
            self._audience.note(f"--fault {fault.text} was not injected: its target was not there")

    def step(self, record: StepRecord) -> None:
        """A step was done."""
        self._audience.step(record)
        if self._board is not None:
            self._board.step(record)
        self._step = max(self._step, record.step)
        self._inject()

    def appraisal(self, record: Appraisal) -> None:
        """The model was evaluated or wrote a text."""
        self._audience.appraisal(record)
        if self._board is not None:
            self._board.appraisal(record)

    def event(self, event: Event) -> None:
        """Something happened."""
        self._audience.event(event)

    def status(self, status: JobStatus) -> None:
        """The status was replaced: ranks that were awaited may be known now."""
        self._audience.status(status)
        self._inject()

    def _inject(self) -> None:
        if self._injector is not None:
            self._injector.advance(self._step)
