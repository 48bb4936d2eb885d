"""Scheduling of reconciles: at once for urgent changes, rate-limited for others, with backoff after errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine

from pretrain_api.backoff import Backoff, Retries

ROUND_SECONDS = 0.2
"""Minimum interval between reconciles for agents' reports alone: steps arrive faster than any reader needs them."""
CLUSTER_BACKOFF = Backoff(first=0.1, factor=2.0, most=10.0, jitter=0.0)
"""Retries after errors of the cluster."""


class ReconcileTrigger:
    """Coalesces triggers into one wake-up. The next reconcile covers every trigger before `wait` returns."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._due = float("inf")
        self._last = float("-inf")

    def now(self) -> None:
        """Trigger a reconcile at once."""
        self._event.set()

    def soon(self) -> None:
        """Trigger a reconcile at once, or after the minimum interval since the last one."""
        self.within(0.0)

    def within(self, seconds: float) -> None:
        """Trigger a reconcile after a delay; an earlier one covers it."""
        loop = asyncio.get_running_loop()
        due = max(loop.time() + seconds, self._last + ROUND_SECONDS)
        if due < self._due:
            self._stop_timer()
            self._due, self._timer = due, loop.call_at(due, self._event.set)

    async def wait(self, timeout: float | None) -> None:
        """Wait for a trigger, at most `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._event.wait()
        self._event.clear()
        self._stop_timer()
        self._last = asyncio.get_running_loop().time()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due, self._timer = float("inf"), None


def cluster_retries() -> Retries:
    """Return the count of consecutive errors of the cluster."""
    return Retries(CLUSTER_BACKOFF, lambda: 0.0)


class ActionRunner:
    """Runs one task at a time in the background, with backoff after failed ones. Calls `done` after each."""

    def __init__(self, done: Callable[[], None]) -> None:
        self._done = done
        self._task: asyncio.Task[bool] | None = None
        self._retries = cluster_retries()
        self._backoff_until = float("-inf")

    def backoff(self) -> float:
        """Return the seconds until a task can start; infinite while one runs. Raises what the last one raised."""
        time = asyncio.get_running_loop().time()
        if self._task is not None:
            if not self._task.done():
                return float("inf")
            if self._task.result():
                self._retries.succeeded()
            else:
                self._backoff_until = time + self._retries.delay()
            self._task = None
        return max(0.0, self._backoff_until - time)

    def start(self, work: Coroutine[None, None, bool]) -> None:
        """Start a task, which returns whether it succeeded."""
        self._task = asyncio.create_task(work)
        self._task.add_done_callback(lambda _: self._done())

    async def stop(self) -> None:
        """Cancel the running task."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
