"""Whether this process should go on: a loop that hangs, a watch that says nothing, a job that nobody looks at."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

LONGEST_LAG_SECONDS = 5.0
LONGEST_SILENCE_SECONDS = 90.0
"""Of a watch, which says something twice as often even if nothing changes."""
LONGEST_WAIT_SECONDS = 60.0
"""Of a job whose wake-up was not followed by a look."""
BEAT_SECONDS = 0.5
REMEMBERED_SECONDS = 15.0
"""A lag counts for so long: a probe may come only every 10 s, and not while the loop hangs."""


class Unhealthy(Exception):
    """This process should be started again; the message says why."""


@dataclass(frozen=True)
class Vitals:
    """What is measured."""

    lag: float
    """Seconds by which the event loop was late lately."""
    silences: dict[str, float]
    """By the name of a watch: seconds since it heard from the API server."""
    oldest_wait: float
    """Seconds that a wake-up of a job has not been served."""


def check(vitals: Vitals) -> None:
    """Raises Unhealthy."""
    if vitals.lag > LONGEST_LAG_SECONDS:
        raise Unhealthy(f"the event loop was late by {vitals.lag:.1f} s")
    for name, seconds in vitals.silences.items():
        if seconds > LONGEST_SILENCE_SECONDS:
            raise Unhealthy(f"nothing was heard of {name} for {seconds:.0f} s")
    if vitals.oldest_wait > LONGEST_WAIT_SECONDS:
        raise Unhealthy(f"a job waits to be looked at for {vitals.oldest_wait:.0f} s")


class Heartbeat:
    """Measures by how much the event loop is late."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._beat_at = clock()
        self._lags: deque[tuple[float, float]] = deque()

    async def run(self) -> None:
        """Beat for ever."""
        while True:
            self.beat()
            await asyncio.sleep(BEAT_SECONDS)

    def beat(self) -> None:
        """The loop has come round; due every BEAT_SECONDS."""
        self._note()
        self._beat_at = self._clock()

    @property
    def lag(self) -> float:
        """The worst of the last while, and of now."""
        self._note()
        return max((lag for _, lag in self._lags), default=0.0)

    def _note(self) -> None:
        now = self._clock()
        lag = now - self._beat_at - BEAT_SECONDS
        if lag > LONGEST_LAG_SECONDS:
            self._lags.append((now, lag))
        while self._lags and self._lags[0][0] < now - REMEMBERED_SECONDS:
            self._lags.popleft()
