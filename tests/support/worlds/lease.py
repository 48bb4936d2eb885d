"""A world of candidates for one Lease in which time is simulated: each has an event loop and a clock of its own, may
stop for a while or die, and its calls take time, fail, or succeed with nobody to hear of it."""

from __future__ import annotations

import asyncio
import copy
import heapq
import inspect
import itertools
import selectors
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, cast

from pretrain_operator.kubernetes.client.api import Api, ApiError, Object
from pretrain_operator.kubernetes.leader.lease import Lease, LeaseLost

NOON = datetime(2027, 1, 15, 12, tzinfo=UTC)

TICK = 1e-6
"""More than a clock's rounding: what is due is due after it."""


@dataclass(frozen=True)
class Fate:
    """What becomes of one call."""

    there: float = 0.001
    back: float = 0.001
    """Seconds to the server, and of its answer."""
    lost: Literal["", "call", "answer"] = ""
    heard: bool = True
    """Of a lost one: the caller is told that the connection broke."""


@dataclass(frozen=True)
class Clock:
    """A candidate's own: it may be anywhere, and too quick or slow."""

    offset: float = 0.0
    rate: float = 1.0
    wall: timedelta = timedelta(0)


class World:
    """The API server, the candidates and the order of events."""

    def __init__(self, fates: Iterable[Fate] = (), answers: Iterable[bool] | None = None) -> None:
        """`answers`: whether a holder's machine takes connections, each time that somebody tries; None: they all do."""
        self.answers = itertools.repeat(True) if answers is None else iter(answers)
        self.time = 0.0
        self.lease: Object | None = None
        self.candidates: list[Candidate] = []
        self.epochs: list[tuple[float, str, int]] = []
        """When, who, which: of each time that it was acquired."""
        self.lost: list[tuple[float, str]] = []
        """When and by whom the Lease was found to be lost."""
        self._fates = iter(fates)
        self._versions = itertools.count(1)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def candidate(self, name: str, clock: Clock | None = None) -> Candidate:
        """A process that wants the Lease from now on."""
        candidate = Candidate(self, name, clock or Clock())
        self.candidates.append(candidate)
        return candidate

    def at(self, time: float, do: Callable[[], None]) -> None:
        """Do this then."""
        heapq.heappush(self._events, (time, next(self._order), do))

    def run(self, until: float) -> None:
        """Let time pass. Nobody ever holds the Lease together with another."""
        while True:
            due = min((candidate.due() for candidate in self.candidates), default=float("inf"))
            if self._events and self._events[0][0] <= due:
                due = self._events[0][0]
            if due > until:
                break
            self.time = max(self.time + TICK, due)
            while self._events and self._events[0][0] <= self.time:
                heapq.heappop(self._events)[2]()
            for candidate in self.candidates:
                candidate.step()
                self.check()
        self.time = max(self.time, until)
        self.check()

    def check(self) -> None:
        """At most one holds."""
        holders = [candidate.name for candidate in self.candidates if candidate.lease.held]
        assert len(holders) <= 1, f"{holders} hold it at {self.time:.3f}"

    def calm(self) -> None:
        """Calls succeed from now on."""
        self._fates = iter(())

    def close(self) -> None:
        """End all processes."""
        for candidate in self.candidates:
            candidate.crash()

    async def call(self, do: Callable[[], Object]) -> Object:
        """What a candidate calls: done at the server's time, answered at the caller's."""
        fate = next(self._fates, Fate())
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Object] = loop.create_future()

        def arrive() -> None:
            outcome: Object | ApiError
            try:
                outcome = do() if fate.lost != "call" else ApiError(0, "Unreachable", "cut")
            except ApiError as error:
                outcome = error
            if fate.lost:
                outcome = ApiError(0, "Unreachable", "cut")
            if not fate.lost or fate.heard:
                self.at(self.time + fate.back, lambda: _answer(loop, answer, outcome))

        self.at(self.time + fate.there, arrive)
        return await answer

    def read(self) -> Object:
        """GET."""
        if self.lease is None:
            raise ApiError(404, "NotFound", "there is no Lease")
        return copy.deepcopy(self.lease)

    def write(self, body: Object) -> Object:
        """POST without a resource version, else PUT."""
        version = body["metadata"].get("resourceVersion")
        if version is None and self.lease is not None:
            raise ApiError(409, "AlreadyExists", "there is a Lease")
        if version is not None and self.lease is None:
            raise ApiError(404, "NotFound", "there is no Lease")
        if self.lease is not None and self.lease["metadata"]["resourceVersion"] != version:
            raise ApiError(409, "Conflict", "it was changed")
        self.lease = copy.deepcopy(body)
        self.lease["metadata"]["resourceVersion"] = str(next(self._versions))
        return self.read()


class Candidate:
    """One process: it waits for the Lease, holds it, and starts again when it has lost it."""

    def __init__(self, world: World, name: str, clock: Clock) -> None:
        self.name = name
        self._world = world
        self._clock = clock
        self._stopped_until = 0.0
        self._start()

    def _start(self) -> None:
        self.loop = _Loop(lambda: self._clock.offset + self._world.time * self._clock.rate)
        where = ("system", "operator", self.name, self.loop.time)
        self.lease = Lease(
            cast(Api, _Api(self._world)), *where, now=self._now, duration=4, address=self.name, answers=self._answers
        )
        self._life = self._do(self._live())

    async def _answers(self, _address: str) -> bool:
        if next(self._world.answers, False):
            return True
        return await asyncio.get_running_loop().create_future()  # not even a refusal comes

    def _now(self) -> datetime:
        return NOON + timedelta(seconds=self._world.time) + self._clock.wall

    async def _live(self) -> None:
        while True:
            epoch = await self.lease.acquire()
            self._world.epochs.append((self._world.time, self.name, epoch))
            try:
                await self.lease.hold()
            except LeaseLost:
                self._world.lost.append((self._world.time, self.name))

    def stop(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after so many seconds."""
        self._stopped_until = max(self._stopped_until, self._world.time + seconds)
        self._world.at(self._stopped_until, lambda: None)

    def crash(self) -> None:
        """SIGKILL."""
        self.loop.forget()
        self.lease = Lease(cast(Api, None), "", "", "")

    def restart(self) -> None:
        """SIGKILL; another process with the same identity starts."""
        self.crash()
        self._start()

    def leave(self) -> None:
        """SIGTERM: it ends in good order."""
        self._life.cancel()
        self._life = self._do(self.lease.release())

    def _do(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self._world.at(self._world.time, lambda: None)  # a round for it
        return self.loop.create_task(work)

    def due(self) -> float:
        """When it next does something by itself, by the world's time."""
        if self._world.time < self._stopped_until:
            return float("inf")
        return (self.loop.due() - self._clock.offset) / self._clock.rate

    def step(self) -> None:
        """Do all that can be done now."""
        if self._world.time >= self._stopped_until:
            self.loop.run_until_idle()


class _Api:
    def __init__(self, world: World) -> None:
        self._world = world

    async def get(self, *_: object) -> Object:
        return await self._world.call(self._world.read)

    async def create(self, _: object, __: object, body: Object) -> Object:
        return await self._world.call(lambda: self._world.write(body))

    async def replace(self, _: object, __: object, ___: object, body: Object) -> Object:
        return await self._world.call(lambda: self._world.write(body))


class _Loop(asyncio.SelectorEventLoop):
    """An event loop on somebody else's time, that ends a run when it would wait."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._own_clock = clock
        self._times: list[float] = []
        self._dead = False
        self._selector_of_ours = _Selector(self.stop)
        super().__init__(self._selector_of_ours)

    def time(self) -> float:
        return self._own_clock()

    def call_at(self, when: float, *arguments: Any, **options: Any) -> asyncio.TimerHandle:
        heapq.heappush(self._times, when)
        return super().call_at(when, *arguments, **options)

    def due(self) -> float:
        return self._times[0] if self._times else float("inf")

    def run_until_idle(self) -> None:
        if self._dead:
            return
        self.run_forever()
        while self._times and self._times[0] <= self.time():
            heapq.heappop(self._times)

    def forget(self) -> None:
        """It never runs again."""
        if not self._dead:
            self._dead = True
            self._times.clear()
            for task in asyncio.all_tasks(self):
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                coroutine = cast(Coroutine[Any, Any, None], task.get_coro())
                if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                    coroutine.close()  # else Python complains that it was never awaited
            self.close()


class _Selector(selectors.SelectSelector):
    def __init__(self, idle: Callable[[], None]) -> None:
        super().__init__()
        self._idle = idle

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout != 0:
            self._idle()
        return []


def _answer(loop: _Loop, future: asyncio.Future[Object], outcome: Object | ApiError) -> None:
    if loop.is_closed() or future.done():
        return
    if isinstance(outcome, ApiError):
        future.set_exception(outcome)
        future.exception()  # whoever waited may be dead: nobody is to complain of that
    else:
        future.set_result(outcome)
