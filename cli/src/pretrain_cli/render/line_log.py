"""The run as plain lines, for output that is no terminal."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TextIO

from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import Appraisal, StepRecord
from pretrain_cli.render.evaluation_text import appraisal_text, appraisal_title
from pretrain_operator.cluster import Event

SECONDS_BETWEEN_STEPS = 2.0


class LineLog:
    """Writes a line for every event, and one for a step every two seconds, the first and the last ones included."""

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
        """A step was done."""
        if self._clock() - self._shown < SECONDS_BETWEEN_STEPS and record.step != self._total:
            return
        self._shown = self._clock()
        mfu = f"  MFU {record.mfu:.1%}" if record.mfu is not None else ""
        workers = f"{record.workers} worker" + "s" * (record.workers != 1)
        self._line(
            f"step {record.step:>{len(str(self._total))}}/{self._total}  loss {record.loss:.4f}  "
            f"{record.tokens_per_second:,.0f} tokens/s{mfu}  {workers}  generation {record.generation}"
        )

    def appraisal(self, record: Appraisal) -> None:
        """The model was evaluated or wrote a text: a line."""
        self._line(f"{appraisal_title(record)} step {record.step}: {appraisal_text(record)}")

    def event(self, event: Event) -> None:
        """Something happened."""
        mark = "WARNING " if event.type == "Warning" else ""
        self._line(f"{mark}{event.reason}: {event.message}")

    def status(self, status: JobStatus) -> None:
        """Nothing of the status is a line of its own: its changes come as events."""

    def note(self, text: str) -> None:
        """Something the user should read."""
        self._line(text)

    def _line(self, text: str) -> None:
        moment = datetime.fromtimestamp(self._clock()).strftime("%H:%M:%S")
        print(f"{moment} {text}", file=self._out, flush=True)
