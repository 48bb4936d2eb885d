"""Plain-line log of a run, for output that is not a terminal."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TextIO

from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import EvaluationResult, StepRecord
from pretrain_cli.render.evaluation_text import evaluation_text, evaluation_title
from pretrain_operator.cluster import Event

SECONDS_BETWEEN_STEPS = 2.0


class LineLog:
    """Writes a line for every event, and a line for a step every two seconds and for the first and last step."""

    def __init__(self, out: TextIO, clock: Callable[[], float], total_steps: int) -> None:
        self._out = out
        self._clock = clock
        self._total = total_steps
        self._shown = float("-inf")

    def __enter__(self) -> LineLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.flush()

    def step(self, record: StepRecord) -> None:
        """Log a step, at most every two seconds."""
        if self._clock() - self._shown < SECONDS_BETWEEN_STEPS and record.step != self._total:
            return
        self._shown = self._clock()
        mfu = f"  MFU {record.mfu:.1%}" if record.mfu is not None else ""
        workers = f"{record.workers} worker" + "s" * (record.workers != 1)
        self._line(
            f"step {record.step:>{len(str(self._total))}}/{self._total}  loss {record.loss:.4f}  "
            f"{record.tokens_per_second:,.0f} tokens/s{mfu}  {workers}  generation {record.generation}"
        )

    def evaluation(self, record: EvaluationResult) -> None:
        """Log an evaluation or a sample."""
        self._line(f"{evaluation_title(record)} step {record.step}: {evaluation_text(record)}")

    def event(self, event: Event) -> None:
        """Log an event."""
        mark = "WARNING " if event.type == "Warning" else ""
        self._line(f"{mark}{event.reason}: {event.message}")

    def status(self, status: JobStatus) -> None:
        """Do nothing: changes of the status are logged as events."""

    def note(self, text: str) -> None:
        """Log a note for the user."""
        self._line(text)

    def _line(self, text: str) -> None:
        moment = datetime.fromtimestamp(self._clock()).strftime("%H:%M:%S")
        print(f"{moment} {text}", file=self._out, flush=True)
