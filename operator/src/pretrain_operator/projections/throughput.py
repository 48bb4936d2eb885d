"""How fast a job does its steps, and when it will be done."""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime

WINDOW = 50
"""Steps over which it is measured: enough to smooth, few enough to follow a change of workers."""


class Rhythm:
    """Seconds from step to step over the last ones, pauses for recovery included; goes on from an earlier figure."""

    def __init__(self, seconds_per_step: float | None = None) -> None:
        self._before = seconds_per_step
        self._recent: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def step(self, step: int, time: float) -> None:
        """A step was done at `time` (unix seconds). After one that goes back all is measured anew from the last one
        that is still done."""
        while self._recent and self._recent[-1][0] >= step:
            self._recent.pop()
        self._recent.append((step, time))

    @property
    def stepped_at(self) -> float | None:
        """Unix seconds of the last step; None before the first."""
        return self._recent[-1][1] if self._recent else None

    @property
    def seconds_per_step(self) -> float | None:
        """The mean; None before there are two steps."""
        if len(self._recent) < 2:
            return self._before
        (first_step, first), (last_step, last) = self._recent[0], self._recent[-1]
        return round((last - first) / (last_step - first_step), 6)


def expected_end(step: int, total: int, stepped_at: float | None, seconds_per_step: float | None) -> str:
    """When the last step will be done at this pace, in RFC 3339; empty: not known, or done already."""
    if stepped_at is None or seconds_per_step is None or step >= total:
        return ""
    end = stepped_at + (total - step) * seconds_per_step
    try:
        return datetime.fromtimestamp(end, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError):  # in more years than a date has
        return ""
