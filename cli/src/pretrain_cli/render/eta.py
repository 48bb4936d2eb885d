"""How far a run is and how long it still takes, from its own steps."""

from __future__ import annotations

from collections import deque
from datetime import timedelta

from pretrain_api.status.records import StepRecord

WINDOW = 50
"""Steps over which the pace is measured: long enough to smooth, short enough to follow a change of workers."""


class Pace:
    """Seconds a step over the last steps, pauses for recovery included."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._recent: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def step(self, record: StepRecord) -> None:
        """A step was done."""
        self._recent.append((record.step, record.time))

    @property
    def remaining(self) -> timedelta | None:
        """Time to the last step, or None before there is a pace."""
        if len(self._recent) < 2:
            return None
        (first_step, first), (last_step, last) = self._recent[0], self._recent[-1]
        if last_step <= first_step:
            return None
        return timedelta(seconds=round((self._total - last_step) * (last - first) / (last_step - first_step)))
