"""Times of a step: data, forward and backward, reduction, optimizer, and checkpoint stall.

On a CPU the host's clock measures them. On a GPU the host only queues work, so events are queued along with it and read
where the step waits for the device anyway, for its loss: nothing waits for them. The optimizer's time is then that of
the previous step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

SPEED_STEPS = 20
"""Steps over which tokens per second are averaged."""
DATA, COMPUTED, REDUCED, UPDATED = range(4)
"""Moments of a step."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step. The remainder of `seconds` is the loop's own: reports and commands."""

    seconds: float = 0.0
    data: float = 0.0
    compute: float = 0.0
    """Forward and backward; for sharded models including their reductions."""
    reduce: float = 0.0
    """From the last backward to the end of the reduction, including the wait for slower ranks."""
    optimizer: float = 0.0
    stall: float = 0.0
    """Checkpoint stall: the time that the save before this step blocked the loop."""


class StepMarks(Protocol):
    """Times of the moments of a step: data read, backward done, reduction done, update done."""

    def mark(self, moment: int) -> None:
        """Record a moment."""
        ...

    def parts(self) -> tuple[float, float, float]:
        """Return the seconds between the moments. Never blocks."""
        ...


class HostStepMarks:
    """Moments by the host's clock, where the host does the work."""

    def __init__(self) -> None:
        self._at = [0.0] * 4

    def mark(self, moment: int) -> None:
        """Read the clock."""
        self._at[moment] = time.perf_counter()

    def parts(self) -> tuple[float, float, float]:
        """Return the differences."""
        data, computed, reduced, updated = self._at
        return computed - data, reduced - computed, updated - reduced


class DeviceEvent(Protocol):
    """The methods of torch.cuda.Event that are used here."""

    def record(self) -> None:
        """Queue the event."""
        ...

    def query(self) -> bool:
        """Return True once the device has reached the event."""
        ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Return the milliseconds from this event to a later one."""
        ...


class DeviceStepMarks:
    """Moments by events in the device's current stream, created once and recorded in every step."""

    def __init__(self, make: Callable[[], DeviceEvent]) -> None:
        self._events = [make() for _ in range(4)]
        self._last = [0.0] * 3
        self._updated = False

    def mark(self, moment: int) -> None:
        """Queue an event. At the end of the reduction the previous update is over, so its time is read."""
        if moment == REDUCED and self._updated:
            self._read(REDUCED)
        self._events[moment].record()
        self._updated = moment == UPDATED or self._updated

    def parts(self) -> tuple[float, float, float]:
        """Return the times of this step, the optimizer's of the previous one; a pending event keeps its last time."""
        self._read(DATA)
        self._read(COMPUTED)
        compute, reduce, optimizer = self._last
        return compute, reduce, optimizer

    def _read(self, moment: int) -> None:
        start, end = self._events[moment : moment + 2]
        if end.query():
            self._last[moment] = start.elapsed_time(end) / 1000


def marks_on(device: torch.device) -> StepMarks:
    """Return the marks for work on this device."""
    if device.type == "cuda":
        return DeviceStepMarks(lambda: torch.cuda.Event(enable_timing=True))
    return HostStepMarks()


class StepTimer:
    """Times of the last steps. Evaluations and holds between steps do not count."""

    def __init__(self, step_tokens: int, marks: StepMarks) -> None:
        self._step_tokens = step_tokens
        self._recent: deque[float] = deque(maxlen=SPEED_STEPS)
        self._began = 0.0
        self._data = 0.0
        self._marks = marks

    def begin(self) -> None:
        """Start a step, which reads data first."""
        self._began = time.perf_counter()

    def data_read(self) -> None:
        """Mark the end of reading data."""
        self._data = time.perf_counter() - self._began
        self._marks.mark(DATA)

    def computed(self) -> None:
        """Mark the end of forward and backward, done or queued."""
        self._marks.mark(COMPUTED)

    def reduced(self) -> None:
        """Mark the end of the reduction."""
        self._marks.mark(REDUCED)

    def end(self, stall: float) -> StepTimes:
        """End the step, its update done or queued; `stall` seconds of a save before it are part of its time."""
        self._marks.mark(UPDATED)
        seconds = time.perf_counter() - self._began + stall
        self._recent.append(seconds)
        return StepTimes(seconds, self._data, *self._marks.parts(), stall)

    @property
    def tokens_per_second(self) -> float:
        """Mean speed of the last SPEED_STEPS steps."""
        return self._step_tokens * len(self._recent) / sum(self._recent)
