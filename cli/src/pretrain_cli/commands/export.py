"""`pretrain export`: a run's checkpoint as a folder in the format of Hugging Face, by the trainer as a process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from pretrain_api.messages.export import (
    EXPORT_EVENT,
    Advanced,
    ExportDtype,
    Exported,
    ExportEvent,
    ExportRequest,
    PassedOver,
    Staged,
)
from pretrain_api.messages.trainer_config import ExitCode, trainer_config
from pretrain_api.problems import InvalidJob
from pretrain_cli.errors import BadInput
from pretrain_cli.targets.checkpoint_store import job_of


class Exit(IntEnum):
    """Exit codes of `pretrain export`."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    STOPPED = 130


@dataclass(frozen=True)
class Wanted:
    """The command line of `pretrain export`."""

    run: Path
    out: Path
    step: int | None
    dtype: ExportDtype


def export(wanted: Wanted) -> int:
    """Export a checkpoint and return the exit code; what was wrong is printed."""
    try:
        request = prepare(wanted)
    except (InvalidJob, BadInput) as problem:
        print(problem, file=sys.stderr)
        return Exit.BAD_INPUT
    try:
        code = _run(request, Console())
    except KeyboardInterrupt:
        code = Exit.STOPPED
    match code:
        case ExitCode.DONE | ExitCode.INVALID | Exit.STOPPED:
            return code
        case _:
            return Exit.FAILED


def prepare(wanted: Wanted) -> ExportRequest:
    """What the trainer is asked for. Raises InvalidJob and BadInput; nothing is written."""
    out = wanted.out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"--out {wanted.out} is not empty: name a folder that is empty or not there yet")
    config = trainer_config(job_of(wanted.run), "")
    return ExportRequest(config=config, out=str(out), step=wanted.step, dtype=wanted.dtype)


def _run(request: ExportRequest, console: Console) -> int:
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain_trainer.hf.export"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin as stdin:
            stdin.write(request.to_json())
        with _view(console) as view:
            for line in process.stdout:
                view.show(EXPORT_EVENT.validate_json(line), request.out)
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


class _View:
    """What happens, as lines and, on a terminal, a bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None)

    def show(self, event: ExportEvent, out: str) -> None:
        """Show an event."""
        match event:
            case Staged():
                self._progress.update(self._task, description=event.text)
                if not self._progress.console.is_terminal:
                    self._print(event.text)
            case Advanced():
                self._progress.update(self._task, completed=event.done, total=event.total)
            case PassedOver():
                self._print(event.message)
            case Exported():
                self._print(
                    f"{out}: step {event.step:,}, {event.tokens:,} tokens, {event.parameters:,} parameters, "
                    f"{event.bytes / 1e6:,.1f} MB, from {event.checkpoint}"
                )

    def _print(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _view(console: Console) -> Iterator[_View]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _View(progress)
