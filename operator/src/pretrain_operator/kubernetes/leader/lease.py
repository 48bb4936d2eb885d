"""Who may act: one holder of a Lease at a time, each with a higher epoch than all before it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from pretrain_operator.kubernetes.client.api import LEASES, Api, ApiError, Object

DURATION_SECONDS = 8
"""Others leave a holder alone for so long after they saw it renew. All else is a part of this."""
UNANSWERED = 3 / 8
"""So long only if nothing answers where the holder is: it is gone, or cut off with its machine."""
FRESH = 1 / 4
"""A holder writes so long after it sent its last renewal that succeeded: before anybody may take over."""
DEADLINE = 3 / 4
"""It ends so long after it: until then the next renewal may still succeed."""
RENEWAL = 1 / 8
TRY = 1 / 4
"""For one call: another one may do better than one that hangs."""
DIAL = 1 / 8
"""For an answer of the holder itself."""
LOOK = 1 / 16
"""Between two looks of one who waits."""
RETRY = 1 / 16
"""Between two tries to renew."""
ADDRESS = "pretrain.dev/address"
"""Annotation of the Lease: where its holder answers HTTP requests, `host:port`."""

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


async def answers(address: str) -> bool:
    """Whether a process says anything to an HTTP request there, `host:port`. Waits for ever. A connection alone tells
    little: the kernel takes it for a process that is stopped as well."""
    host, _, port = address.rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        try:
            writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
            return bool(await reader.read(1))
        finally:
            writer.close()
    except (OSError, ValueError):
        return False


class Lease:
    """One candidate for a Lease. `acquire`, then `hold` beside the work; `release` when the work has stopped.

    A Lease is taken over when it was let go, or when it has not changed for its duration by the candidate's own clock;
    also if its holder has the candidate's identity: that may be another process. It is taken over sooner when nothing
    answers at the holder's address either (`answers` tells). Both rest on the Lease alone: a holder that has not
    renewed for a shorter time than either does not write. Writes are guarded by the resource version: of several
    candidates one wins. The duration is in whole seconds, `clock` counts monotonic ones, `now` is written down for
    people. `address`: where this candidate answers HTTP requests; empty: others wait for the whole duration."""

    def __init__(
        self,
        api: Api,
        namespace: str,
        name: str,
        identity: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        duration: int = DURATION_SECONDS,
        address: str = "",
        answers: Callable[[str], Awaitable[bool]] = answers,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._clock = clock
        self._duration = duration
        self._address = address
        self._answers = answers
        self._now = now
        self._seen: Seen | None = None
        self._mine: Object | None = None
        """The Lease as this holder last wrote it."""
        self._renewed = float("-inf")
        """When the last renewal that succeeded was sent."""
        self._news = asyncio.Event()
        """It was renewed, or lost."""
        self._complaint = ""

    @property
    def held(self) -> bool:
        """Nobody else may hold it now. Ask before each write: a process that was stopped for a while does not know."""
        return self._mine is not None and self._clock() < self._renewed + FRESH * self._duration

    async def surely_held(self) -> bool:
        """Wait until nobody else may hold it; False: it is lost."""
        while not self.held:
            if self._mine is None:
                return False
            await self._news.wait()
        return True

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
            if self._mine is None or self._clock() >= self._renewed + DEADLINE * self._duration:  # it was stopped
                raise self._lost("the Lease was not renewed in time")
            try:
                async with asyncio.timeout(self._renewed + DEADLINE * self._duration - self._clock()):
                    self._mine = await self._renewed_after(self._mine)
            except TimeoutError:
                raise self._lost("the Lease could not be renewed in time") from None

    async def release(self) -> None:
        """Let the Lease go, so that another one need not wait. Call it when `hold` was cancelled and nothing acts."""
        mine, self._mine = self._mine, None
        self._tell()
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
        if spec.get("holderIdentity") and left > 0 and not await self._is_unanswered(found, self._seen.since):
            return min(left, LOOK * self._duration)
        await self._take(found)
        return 0.0

    async def _is_unanswered(self, found: Object, since: float) -> bool:
        """Not renewed for a while, and nobody is there who could still do so. Returns when that time is over."""
        duration = max(self._duration, _spec(found).get("leaseDurationSeconds") or 0)
        address = _annotations(found).get(ADDRESS)
        if not address or self._clock() < since + (UNANSWERED - DIAL) * duration:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DIAL * duration):
                if address != self._address and await self._answers(address):  # else it was a process before this one
                    return False
        await asyncio.sleep(max(0.0, since + UNANSWERED * duration - self._clock()))
        return True

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
        metadata: Object = {**found["metadata"], "annotations": {**_annotations(found), ADDRESS: self._address}}
        sent = self._clock()
        try:
            self._mine = await self._write({**found, "metadata": metadata, "spec": spec})
        except ApiError as error:
            if error.status != 409:  # AlreadyExists or Conflict: another one was quicker
                raise
            return
        self._renewed = sent
        self._tell()
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
            self._tell()
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

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _lost(self, message: str) -> LeaseLost:
        self._mine = None
        self._tell()
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


def _annotations(lease: Object) -> dict[str, str]:
    return lease["metadata"].get("annotations") or {}


def _next_transitions(lease: Object, now: datetime) -> int:
    """One more than before. A new Lease begins with the minutes since 1970: one that was deleted, with its namespace
    for instance, had counted less far unless it changed hands every minute; agents that outlived it refuse a lower
    epoch."""
    before = _spec(lease).get("leaseTransitions")
    return int(now.timestamp() // 60) if before is None else before + 1


def _micro_time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
