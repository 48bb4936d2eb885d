"""`pretrain export`: export a checkpoint in Hugging Face format, by the trainer in a subprocess."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from pretrain_api.messages.export import (
    EXPORT_EVENT,
    Advanced,
    CheckpointSkipped,
    ExportDtype,
    Exported,
    ExportEvent,
    ExportRequest,
    Staged,
)
from pretrain_api.messages.trainer_config import ExitCode, trainer_config
from pretrain_api.problems import InvalidJob
from pretrain_cli.errors import BadInput, CliExit
from pretrain_cli.targets.checkpoint_store import job_of


@dataclass(frozen=True)
class ExportOptions:
    """Arguments of `pretrain export`."""

    run: Path
    out: Path
    step: int | None
    dtype: ExportDtype


def export(options: ExportOptions) -> int:
    """Export a checkpoint, or print the mistake; return the exit code."""
    try:
        request = prepare(options)
    except (InvalidJob, BadInput) as problem:
        print(problem, file=sys.stderr)
        return CliExit.BAD_INPUT
    try:
        code = _run(request, Console())
    except KeyboardInterrupt:
        code = CliExit.STOPPED
    match code:
        case ExitCode.DONE | ExitCode.INVALID | CliExit.STOPPED:
            return code
        case _:
            return CliExit.FAILED


def prepare(options: ExportOptions) -> ExportRequest:
    """Build the request to the trainer. Raises InvalidJob and BadInput; writes nothing."""
    out = options.out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"--out {options.out} is not empty: give a folder that is empty or does not exist")
    config = trainer_config(job_of(options.run), "")
    return ExportRequest(config=config, out=str(out), step=options.step, dtype=options.dtype)


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


class _ExportView:
    """Progress of an export: lines and, on a terminal, a bar."""

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
            case CheckpointSkipped():
                self._print(event.message)
            case Exported():
                self._print(
                    f"{out}: step {event.step:,}, {event.tokens:,} tokens, {event.parameters:,} parameters, "
                    f"{event.bytes / 1e6:,.1f} MB, from {event.checkpoint}"
                )

    def _print(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _view(console: Console) -> Iterator[_ExportView]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _ExportView(progress)
