"""Where the time of steps goes: data, forward and backward, reduction, optimizer, and what a save held up.

On a CPU plain clocks say it. On a GPU the host only queues work, so events are queued along with it and looked at where
the step waits for the device anyway, for its loss: nothing waits for them. The optimizer's part is then that of the
step before.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

SPEED_STEPS = 20
"""Tokens per second are taken over so many steps."""
DATA, COMPUTED, REDUCED, UPDATED = range(4)
"""Moments of a step."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step. What is left of `seconds` is the loop's own: reports, evaluation of signals."""

    seconds: float = 0.0
    data: float = 0.0
    compute: float = 0.0
    """Forward and backward; of sharded models with the reductions within."""
    reduce: float = 0.0
    """After the last backward until the sums of all ranks are there: waiting for slower ranks included."""
    optimizer: float = 0.0
    stall: float = 0.0
    """How long the save before this step held up the loop."""


class StepMarks(Protocol):
    """The moments of a step: its data is there, backward is done, the sums are there, the update is done."""

    def mark(self, moment: int) -> None:
        """The step has come to this moment."""
        ...

    def parts(self) -> tuple[float, float, float]:
        """Seconds between the moments. Never waits."""
        ...


class HostStepMarks:
    """By the host's clock, where the host does the work."""

    def __init__(self) -> None:
        self._at = [0.0] * 4

    def mark(self, moment: int) -> None:
        """Look at the clock."""
        self._at[moment] = time.perf_counter()

    def parts(self) -> tuple[float, float, float]:
        """The differences."""
        data, computed, reduced, updated = self._at
        return computed - data, reduced - computed, updated - reduced


class DeviceEvent(Protocol):
    """The part of torch.cuda.Event that is used here."""

    def record(self) -> None:
        """Queue it."""
        ...

    def query(self) -> bool:
        """Whether the device has come to it."""
        ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds from this event to a later one."""
        ...


class DeviceStepMarks:
    """By events in the device's current stream. They are made once and recorded again in every step."""

    def __init__(self, make: Callable[[], DeviceEvent]) -> None:
        self._events = [make() for _ in range(4)]
        self._last = [0.0] * 3
        self._updated = False

    def mark(self, moment: int) -> None:
        """Queue an event. Once the sums are there, the update of the step before is surely over: it is looked at."""
        if moment == REDUCED and self._updated:
            self._look(REDUCED)
        self._events[moment].record()
        self._updated = moment == UPDATED or self._updated

    def parts(self) -> tuple[float, float, float]:
        """Of this step, the optimizer's of the one before; what still runs keeps the figure that it had."""
        self._look(DATA)
        self._look(COMPUTED)
        compute, reduce, optimizer = self._last
        return compute, reduce, optimizer

    def _look(self, moment: int) -> None:
        start, end = self._events[moment : moment + 2]
        if end.query():
            self._last[moment] = start.elapsed_time(end) / 1000


def marks_on(device: torch.device) -> StepMarks:
    """The marks for work on this device."""
    if device.type == "cuda":
        return DeviceStepMarks(lambda: torch.cuda.Event(enable_timing=True))
    return HostStepMarks()


class StepTimer:
    """The times of the last steps. Evaluations and holds between steps are not in it."""

    def __init__(self, step_tokens: int, marks: StepMarks) -> None:
        self._step_tokens = step_tokens
        self._recent: deque[float] = deque(maxlen=SPEED_STEPS)
        self._began = 0.0
        self._data = 0.0
        self._marks = marks

    def begin(self) -> None:
        """A step begins: its first part is reading data."""
        self._began = time.perf_counter()

    def data_read(self) -> None:
        """The step's data is there."""
        self._data = time.perf_counter() - self._began
        self._marks.mark(DATA)

    def computed(self) -> None:
        """Forward and backward of all this rank's micro-batches are done, or queued."""
        self._marks.mark(COMPUTED)

    def reduced(self) -> None:
        """The sums over all ranks are there."""
        self._marks.mark(REDUCED)

    def end(self, stall: float) -> StepTimes:
        """The update is done, or queued; `stall`: seconds that the save before it blocked, part of the step's time."""
        self._marks.mark(UPDATED)
        seconds = time.perf_counter() - self._began + stall
        self._recent.append(seconds)
        return StepTimes(seconds, self._data, *self._marks.parts(), stall)

    @property
    def tokens_per_second(self) -> float:
        """Over the last few steps."""
        return self._step_tokens * len(self._recent) / sum(self._recent)
