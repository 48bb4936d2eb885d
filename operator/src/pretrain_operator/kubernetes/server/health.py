"""Liveness of the operator process: event-loop lag, silent watches, jobs that wait for a reconcile."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

MAX_LAG_SECONDS = 5.0
MAX_SILENCE_SECONDS = 90.0
"""Of a watch. A healthy one is renewed twice as often, even if nothing changes."""
MAX_WAIT_SECONDS = 60.0
"""Of a job that is enqueued and not reconciled."""
LAG_PERIOD_SECONDS = 0.5
LAG_MEMORY_SECONDS = 15.0
"""Time for which a lag counts: probes come every 10 s, and none is answered while the loop hangs."""


class Unhealthy(Exception):
    """The process must be restarted; the message says why."""


@dataclass(frozen=True)
class Vitals:
    """Measurements that decide about health."""

    lag: float
    """Longest recent delay of the event loop in seconds."""
    silences: dict[str, float]
    """Seconds since each watch heard from the API server, by name."""
    oldest_wait: float
    """Longest time in seconds that a job has been enqueued without a reconcile."""


def check(vitals: Vitals) -> None:
    """Raise Unhealthy if a measurement exceeds its limit."""
    if vitals.lag > MAX_LAG_SECONDS:
        raise Unhealthy(f"event loop lag {vitals.lag:.1f} s")
    for name, seconds in vitals.silences.items():
        if seconds > MAX_SILENCE_SECONDS:
            raise Unhealthy(f"watch of {name} silent for {seconds:.0f} s")
    if vitals.oldest_wait > MAX_WAIT_SECONDS:
        raise Unhealthy(f"a job has waited {vitals.oldest_wait:.0f} s for a reconcile")


class LoopLag:
    """Meter of the event loop's lag."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ticked_at = clock()
        self._lags: deque[tuple[float, float]] = deque()

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            self.tick()
            await asyncio.sleep(LAG_PERIOD_SECONDS)

    def tick(self) -> None:
        """Record that the loop runs; due every LAG_PERIOD_SECONDS."""
        self._note()
        self._ticked_at = self._clock()

    @property
    def seconds(self) -> float:
        """Longest lag within LAG_MEMORY_SECONDS, the current one included."""
        self._note()
        return max((lag for _, lag in self._lags), default=0.0)

    def _note(self) -> None:
        now = self._clock()
        lag = now - self._ticked_at - LAG_PERIOD_SECONDS
        if lag > MAX_LAG_SECONDS:
            self._lags.append((now, lag))
        while self._lags and self._lags[0][0] < now - LAG_MEMORY_SECONDS:
            self._lags.popleft()
