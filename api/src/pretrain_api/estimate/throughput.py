"""Measured step rate of a job and its expected end."""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime, timedelta

WINDOW = 50
"""Steps in the mean: enough to smooth it, few enough to follow a change of workers."""


class StepRate:
    """Seconds per step over the last steps, pauses for recovery included; starts from an earlier measurement."""

    def __init__(self, seconds_per_step: float | None = None) -> None:
        self._before = seconds_per_step
        self._recent: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def add(self, step: int, time: float) -> None:
        """Record a step completed at `time` (unix seconds). A repeated step discards itself and all later steps."""
        while self._recent and self._recent[-1][0] >= step:
            self._recent.pop()
        self._recent.append((step, time))

    @property
    def stepped_at(self) -> float | None:
        """Unix seconds of the last step; None before the first."""
        return self._recent[-1][1] if self._recent else None

    @property
    def seconds_per_step(self) -> float | None:
        """Mean seconds per step; None before the second step."""
        if len(self._recent) < 2:
            return self._before
        (first_step, first), (last_step, last) = self._recent[0], self._recent[-1]
        return round((last - first) / (last_step - first_step), 6)

    def remaining(self, total: int) -> timedelta | None:
        """Return the time from the last step to step `total` at this rate; None: unknown."""
        if not self._recent or (seconds := self.seconds_per_step) is None:
            return None
        return timedelta(seconds=round((total - self._recent[-1][0]) * seconds))


def expected_end(step: int, total: int, stepped_at: float | None, seconds_per_step: float | None) -> str:
    """Return the expected time of the last step in RFC 3339; empty: unknown, or done already."""
    if stepped_at is None or seconds_per_step is None or step >= total:
        return ""
    end = stepped_at + (total - step) * seconds_per_step
    try:
        return datetime.fromtimestamp(end, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError):  # beyond the years of a date
        return ""
