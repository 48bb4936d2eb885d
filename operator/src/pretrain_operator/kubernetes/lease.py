"""Who may act: one holder of a Lease at a time, each with a higher epoch than all before it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from pretrain_operator.kubernetes.api import LEASES, Api, ApiError, Object

DURATION_SECONDS = 8
"""Others leave a holder alone for so long after they saw it renew. All else is a part of this."""
DEADLINE = 3 / 4
"""A holder stops acting so long after it sent its last renewal that succeeded: before others may take over."""
RENEWAL = 1 / 4
TRY = 1 / 4
"""For one call: another one may do better than one that hangs."""
LOOK = 1 / 8
"""Between two looks of one who waits: it takes over within 9/8 of the duration after the last renewal."""
RETRY = 1 / 16
"""Between two tries to renew."""

log = structlog.get_logger()


class LeaseLost(Exception):
    """The Lease was not renewed in time, or another one holds it: stop acting at once."""


@dataclass(frozen=True)
class Seen:
    """A Lease as it was seen, and since when it is like that."""

    version: str
    """Its resource version: any renewal changes it."""
    since: float
    """By the own monotonic clock: what clocks elsewhere say does not matter."""


class Lease:
    """One candidate for a Lease. `acquire`, then `hold` beside the work; `release` when the work has stopped.

    A Lease is taken over when it was let go, or when it has not changed for its duration by the candidate's own clock;
    also if its holder has the candidate's identity: that may be another process. Writes are guarded by the resource
    version: of several candidates one wins. The duration is in whole seconds, `clock` counts monotonic ones, `now` is
    written down for people."""

    def __init__(
        self,
        api: Api,
        namespace: str,
        name: str,
        identity: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        duration: int = DURATION_SECONDS,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._clock = clock
        self._duration = duration
        self._now = now
        self._seen: Seen | None = None
        self._mine: Object | None = None
        """The Lease as this holder last wrote it."""
        self._renewed = float("-inf")
        """When the last renewal that succeeded was sent."""
        self._complaint = ""

    @property
    def held(self) -> bool:
        """Nobody else may hold it now. Ask before each write: a process that was stopped for a while does not know."""
        return self._mine is not None and self._clock() < self._renewed + DEADLINE * self._duration

    async def acquire(self) -> int:
        """Wait for the Lease and take it; returns the epoch, higher than that of any holder before."""
        while True:
            try:
                pause = await self._try_to_take()
            except (ApiError, TimeoutError) as error:
                self._complain(error)
                pause = LOOK * self._duration
            if self._mine is not None:
                return self._mine["spec"]["leaseTransitions"] + 1
            await asyncio.sleep(pause)

    async def hold(self) -> None:
        """Renew the Lease for ever; raises LeaseLost when that fails."""
        while True:
            await asyncio.sleep(max(0.0, self._renewed + RENEWAL * self._duration - self._clock()))
            if self._mine is None or not self.held:  # the process was stopped for a while
                raise self._lost("the Lease was not renewed in time")
            try:
                async with asyncio.timeout(self._renewed + DEADLINE * self._duration - self._clock()):
                    self._mine = await self._renewed_after(self._mine)
            except TimeoutError:
                raise self._lost("the Lease could not be renewed in time") from None

    async def release(self) -> None:
        """Let the Lease go, so that another one need not wait. Call it when `hold` was cancelled and nothing acts."""
        mine, self._mine = self._mine, None
        try:
            while mine is not None:
                try:
                    await self._write({**mine, "spec": {**mine["spec"], "holderIdentity": ""}})
                    return
                except ApiError as error:
                    if error.status != 409:
                        raise
                    mine = await self._find_mine(mine)  # the last renewal may have arrived unheard
        except (ApiError, TimeoutError, LeaseLost) as error:
            self._complain(error)  # it runs out by itself

    async def _try_to_take(self) -> float:
        """Take the Lease if it is free; otherwise returns the seconds after which it is worth another look."""
        found = await self._find()
        if found is None:
            await self._take({"metadata": {"name": self._name}})
            return 0.0
        version, now = found["metadata"]["resourceVersion"], self._clock()
        if self._seen is None or self._seen.version != version:
            self._seen = Seen(version, now)
        spec = _spec(found)
        left = self._seen.since + max(self._duration, spec.get("leaseDurationSeconds") or 0) - now
        if spec.get("holderIdentity") and left > 0:
            return min(left, LOOK * self._duration)
        await self._take(found)
        return 0.0

    async def _take(self, found: Object) -> None:
        """Write ourselves down as the new holder. Not to know whether that succeeded is not to hold it."""
        now = self._now()
        spec = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._duration,
            "acquireTime": _micro_time(now),
            "renewTime": _micro_time(now),
            "leaseTransitions": _next_transitions(found, now),
        }
        sent = self._clock()
        try:
            self._mine = await self._write({**found, "spec": spec})
        except ApiError as error:
            if error.status != 409:  # AlreadyExists or Conflict: another one was quicker
                raise
            return
        self._renewed = sent
        self._complaint = ""

    async def _renewed_after(self, mine: Object) -> Object:
        """The Lease after a renewal, however many tries that takes; raises LeaseLost if another one has it."""
        while True:
            sent = self._clock()
            try:
                renewed = await self._write({**mine, "spec": {**mine["spec"], "renewTime": _micro_time(self._now())}})
            except (ApiError, TimeoutError) as error:
                self._complain(error)
                if isinstance(error, ApiError) and error.status in (404, 409):
                    with contextlib.suppress(ApiError, TimeoutError):
                        mine = await self._find_mine(mine)
                await asyncio.sleep(max(0.0, sent + RETRY * self._duration - self._clock()))
                continue
            self._renewed = sent
            self._complaint = ""
            return renewed

    async def _find_mine(self, mine: Object) -> Object:
        """The Lease as it is now: changed by a renewal of ours whose answer was lost, or by a person. Raises LeaseLost
        if it is another one's."""
        found = await self._find()
        spec = _spec(found or {})
        if found is None or any(spec.get(key) != mine["spec"][key] for key in ("holderIdentity", "leaseTransitions")):
            raise self._lost(f"the Lease is held by {spec.get('holderIdentity') or 'nobody'}")
        return found

    def _lost(self, message: str) -> LeaseLost:
        self._mine = None
        return LeaseLost(message)

    async def _find(self) -> Object | None:
        try:
            async with asyncio.timeout(TRY * self._duration):
                return await self._api.get(LEASES, self._namespace, self._name)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def _write(self, body: Object) -> Object:
        body = {"apiVersion": LEASES.api_version, "kind": "Lease", **body}
        async with asyncio.timeout(TRY * self._duration):
            if "resourceVersion" in body["metadata"]:
                return await self._api.replace(LEASES, self._namespace, self._name, body)
            return await self._api.create(LEASES, self._namespace, body)

    def _complain(self, error: Exception) -> None:
        """Log an error, once however often it comes again in a row."""
        text = str(error) or "the API server does not answer"
        if text != self._complaint:
            self._complaint = text
            log.warning("lease: a call failed", lease=self._name, error=text)


def _spec(lease: Object) -> Object:
    return lease.get("spec") or {}


def _next_transitions(lease: Object, now: datetime) -> int:
    """One more than before. A new Lease begins with the minutes since 1970: one that was deleted, with its namespace
    for instance, had counted less far unless it changed hands every minute; agents that outlived it refuse a lower
    epoch."""
    before = _spec(lease).get("leaseTransitions")
    return int(now.timestamp() // 60) if before is None else before + 1


def _micro_time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
