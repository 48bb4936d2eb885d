"""`pretrain run`: run a job on this machine, from its file to its report."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from pretrain_api.messages.trainer_config import trainer_config
from pretrain_api.problems import InvalidJob
from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import EvaluationResult, StepRecord
from pretrain_cli.errors import BadInput, CliExit
from pretrain_cli.inputs.faults import Fault
from pretrain_cli.inputs.prepare import PreparedJob, RunOptions, prepare
from pretrain_cli.render.line_log import LineLog
from pretrain_cli.render.report import Result, write_outputs
from pretrain_cli.render.summary import summarise
from pretrain_cli.render.tensorboard import FOLDER, TensorBoardWriter, require_tensorboard
from pretrain_cli.render.terminal import TerminalView
from pretrain_cli.targets.fault_injection import FaultInjector
from pretrain_cli.targets.previous_run import check_same_job, is_complete, next_status, wall_seconds, write_job
from pretrain_cli.targets.worker_command import THREADS, worker_command
from pretrain_operator.cluster import Event
from pretrain_operator.local.run_folder import FolderInUse, RunFolder, UnreadableStatus
from pretrain_operator.local.supervisor import OperatorCrashed, Supervisor, SupervisorConfig

REFRESH_SECONDS = 0.25
SAME_SECONDS = 0.3
"""A repeated signal within this time is the same Ctrl-C: wrappers such as `timeout` forward the terminal's signal."""


EXITS: dict[Result, CliExit] = {"Succeeded": CliExit.DONE, "Failed": CliExit.FAILED, "Stopped": CliExit.STOPPED}


@dataclass(frozen=True)
class RunOutcome:
    """Outcome of a run. `at_once`: stopped by a second Ctrl-C, without waiting."""

    result: Result
    reason: str
    status: JobStatus
    at_once: bool = False


def run(options: RunOptions) -> int:
    """Run a job, or print the mistakes of the input; return the exit code."""
    try:
        if options.tensorboard:
            require_tensorboard()
        prepared = prepare(options, os.environ)
        with RunFolder(prepared.out) as folder:
            return _run_in(folder, prepared)
    except (InvalidJob, BadInput, FolderInUse, UnreadableStatus) as problem:
        print(problem, file=sys.stderr)
        return CliExit.BAD_INPUT


def _run_in(folder: RunFolder, prepared: PreparedJob) -> int:
    """Run the job in its locked folder."""
    job = prepared.job
    check_same_job(folder, job)
    status = folder.read_status()
    total = job.spec.training.total_steps
    before = wall_seconds(folder)
    if is_complete(status, total):
        print(f"{job.metadata.name} has already done its {status.step:,} steps: raise training.steps to train longer.")
        return _finish(folder, job, RunOutcome("Succeeded", status.reason, status), before)
    nan_steps = tuple(fault.step for fault in prepared.faults if fault.action == "nan")
    config = trainer_config(job, status.job_uid, threads=THREADS, nan_steps=nan_steps)
    folder.trainer_config.write_text(config.to_json() + "\n")
    write_job(folder, job)
    started = time.monotonic()
    console = Console()
    view = TerminalView(console, time.time, job.metadata.name, total) if console.is_terminal else None
    with view or LineLog(sys.stdout, time.time, total) as audience:
        for note in prepared.notes:
            audience.note(note)
        with _board(folder, prepared) as board:
            outcome = asyncio.run(_supervise(folder, prepared, next_status(status, total), audience, board))
    return _finish(folder, job, outcome, before + time.monotonic() - started)


def _finish(folder: RunFolder, job: PretrainJob, outcome: RunOutcome, seconds: float) -> int:
    """Write the outputs and print the summary."""
    hint = _resume_hint(outcome.status)
    try:
        if outcome.at_once:
            raise KeyboardInterrupt
        report = write_outputs(folder.path, job, outcome.status, seconds, outcome.result, outcome.reason)
    except KeyboardInterrupt:
        print(f"Stopped without a report. {hint}")
        return CliExit.STOPPED
    print(summarise(report, outcome.status, folder.path))
    if outcome.result == "Stopped":
        print(f"\nStopped. {hint}")
    return EXITS[outcome.result]


def _resume_hint(status: JobStatus) -> str:
    if status.checkpoints.latest_step is None:
        return "No checkpoint was saved: the same command starts from the beginning."
    return f"Run the same command to resume from step {status.checkpoints.latest_step:,}."


def _board(folder: RunFolder, prepared: PreparedJob) -> AbstractContextManager[TensorBoardWriter | None]:
    return TensorBoardWriter(folder.path / FOLDER) if prepared.tensorboard else nullcontext()


async def _supervise(
    folder: RunFolder,
    prepared: PreparedJob,
    status: JobStatus,
    audience: TerminalView | LineLog,
    board: TensorBoardWriter | None,
) -> RunOutcome:
    """Run the job under a supervisor until it ends or the user stops it."""
    events = _RunEvents(audience, board)
    config = SupervisorConfig(folder, events, partial(worker_command, folder, prepared.job, status.job_uid))
    supervisor = Supervisor(config, prepared.job, status)
    events.begin(supervisor, prepared.faults, status.step)
    running = asyncio.ensure_future(supervisor.run())
    interrupts = _Interrupts(supervisor, running, audience)
    beside = (asyncio.create_task(_redraw(audience)), asyncio.create_task(_take_requests(supervisor)))
    try:
        with interrupts:
            final = await running
    except OperatorCrashed as crash:
        return RunOutcome("Failed", str(crash), supervisor.status)
    except asyncio.CancelledError:
        if not interrupts.at_once:
            raise
        return RunOutcome("Stopped", "Ctrl-C, twice", supervisor.status, at_once=True)
    finally:
        for task in beside:
            task.cancel()
    events.report_missed()
    if final.phase == "Succeeded":
        return RunOutcome("Succeeded", final.reason, final)
    if final.phase == "Failed":
        return RunOutcome("Failed", f"{final.reason}: {final.message}" if final.message else final.reason, final)
    return RunOutcome("Stopped", "stopped by the user", final)


async def _redraw(audience: TerminalView | LineLog) -> None:
    while isinstance(audience, TerminalView):
        audience.refresh()
        await asyncio.sleep(REFRESH_SECONDS)


async def _take_requests(supervisor: Supervisor) -> None:
    """Poll the folder for requests of `pretrain profile`."""
    while True:
        supervisor.poll_requests()
        await asyncio.sleep(REFRESH_SECONDS)


class _Interrupts:
    """Handler of Ctrl-C and SIGTERM: the first takes a checkpoint and stops the run, the second stops at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(
        self, supervisor: Supervisor, running: asyncio.Future[JobStatus], audience: TerminalView | LineLog
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
        message = "taking a checkpoint before the run stops; Ctrl-C again stops it at once"
        self._audience.event(Event("Normal", "Stopping", message))


class _RunEvents:
    """Observer of a run: updates the view and injects due faults."""

    def __init__(self, audience: TerminalView | LineLog, board: TensorBoardWriter | None) -> None:
        self._audience = audience
        self._board = board
        self._injector: FaultInjector | None = None
        self._step = 0

    def begin(self, supervisor: Supervisor, faults: tuple[Fault, ...], step: int) -> None:
        """Start injecting into this run; faults up to `step`, which is done already, are skipped."""
        self._step = step
        for fault in faults:
            if fault.step <= step:
                self._audience.note(f"--fault {fault.text} is skipped: step {step} is done already")
        self._injector = FaultInjector([fault for fault in faults if fault.step > step], supervisor)

    def report_missed(self) -> None:
        """Print the faults that found no target."""
        for fault in self._injector.pending if self._injector else ():
            self._audience.note(f"--fault {fault.text} was not injected: its target did not exist")

    def step(self, record: StepRecord) -> None:
        """Handle a completed step."""
        self._audience.step(record)
        if self._board is not None:
            self._board.step(record)
        self._step = max(self._step, record.step)
        self._inject()

    def evaluation(self, record: EvaluationResult) -> None:
        """Handle an evaluation or a sample."""
        self._audience.evaluation(record)
        if self._board is not None:
            self._board.evaluation(record)

    def event(self, event: Event) -> None:
        """Handle an event."""
        self._audience.event(event)

    def status(self, status: JobStatus) -> None:
        """Handle a new status; it may name the ranks that faults wait for."""
        self._audience.status(status)
        self._inject()

    def _inject(self) -> None:
        if self._injector is not None:
            self._injector.advance(self._step)
