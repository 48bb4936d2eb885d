"""When the next round begins: at once for what matters, seldom for what does not, later and later after errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine

ROUND_SECONDS = 0.2
"""Between two rounds for nothing but what agents say: steps come faster than anybody reads."""
FIRST_RETRY_SECONDS = 0.1
LAST_RETRY_SECONDS = 10.0


class Wake:
    """Many causes, one awakening. What was said before `wait` returns is covered by the round that follows it."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._due = float("inf")
        self._last = float("-inf")

    def now(self) -> None:
        """A round is due at once."""
        self._event.set()

    def soon(self) -> None:
        """A round is due, at once unless the last one has just begun."""
        self.within(0.0)

    def within(self, seconds: float) -> None:
        """A round is due after so many seconds, or with one that is due before."""
        loop = asyncio.get_running_loop()
        due = max(loop.time() + seconds, self._last + ROUND_SECONDS)
        if due < self._due:
            self._stop_timer()
            self._due, self._timer = due, loop.call_at(due, self._event.set)

    async def wait(self, timeout: float | None) -> None:
        """Return when a round is due, or after so many seconds."""
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


class Retries:
    """Delays after errors in a row: each twice the one before."""

    def __init__(self) -> None:
        self._errors = 0

    def succeeded(self) -> None:
        """The next error is the first one again."""
        self._errors = 0

    def delay(self) -> float:
        """There was an error: seconds to wait before the next try."""
        self._errors += 1
        return min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2.0 ** min(self._errors - 1, 16))


class Hands:
    """One piece of work at a time, with a rest after one that failed. `done` is called after each."""

    def __init__(self, done: Callable[[], None]) -> None:
        self._done = done
        self._work: asyncio.Task[bool] | None = None
        self._retries = Retries()
        self._rest_until = float("-inf")

    def rest(self) -> float:
        """Seconds until new work can start; infinite: until `done` is called. Raises what the last work raised."""
        time = asyncio.get_running_loop().time()
        if self._work is not None:
            if not self._work.done():
                return float("inf")
            if self._work.result():
                self._retries.succeeded()
            else:
                self._rest_until = time + self._retries.delay()
            self._work = None
        return max(0.0, self._rest_until - time)

    def start(self, work: Coroutine[None, None, bool]) -> None:
        """Begin work, which says whether it succeeded."""
        self._work = asyncio.create_task(work)
        self._work.add_done_callback(lambda _: self._done())

    async def stop(self) -> None:
        """Drop the work under way."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait((self._work,))
