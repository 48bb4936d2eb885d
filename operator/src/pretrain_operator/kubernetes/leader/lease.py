"""Leader election by a Lease: one holder at a time, each with a higher epoch than all before it."""

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
"""Time after an observed renewal before others take over. All other times are fractions of it."""
UNANSWERED = 3 / 8
"""Fraction after which others take over if the holder's address does not answer: it is gone, or partitioned."""
FRESH = 1 / 4
"""Fraction after its last successful renewal in which a holder writes: before anybody may take over."""
DEADLINE = 3 / 4
"""Fraction after which a holder gives up: until then a renewal may still succeed."""
RENEWAL = 1 / 8
"""Fraction between renewals."""
TRY = 1 / 4
"""Time limit of one API call: a retry may succeed where a call hangs."""
DIAL = 1 / 8
"""Time limit for an answer at the holder's address."""
LOOK = 1 / 16
"""Fraction between two checks of a candidate."""
RETRY = 1 / 16
"""Fraction between two attempts to renew."""
ADDRESS = "pretrain.dev/address"
"""Annotation of the Lease: `host:port` at which its holder answers HTTP requests."""

log = structlog.get_logger()


class LeaseLost(Exception):
    """The Lease was not renewed in time or another candidate holds it: stop acting at once."""


@dataclass(frozen=True)
class Observation:
    """A resource version of the Lease, and the time of its first sighting."""

    version: str
    """Resource version: any renewal changes it."""
    since: float
    """By the own monotonic clock: clocks of other machines do not matter."""


async def answers(address: str) -> bool:
    """Tell whether a process answers an HTTP request at `host:port`. No time limit of its own. An accepted connection
    is not enough: the kernel accepts it for a stopped process, too."""
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

    A candidate takes over a Lease that was released, or that has not changed for its duration by the candidate's own
    clock, also if the holder has the same identity: that may be another process. It takes over sooner if the holder's
    address does not answer. Both are safe by the Lease alone: a holder stops writing before either time is over.
    Writes are guarded by the resource version: of several candidates one wins. `duration` is in whole seconds, `clock`
    is monotonic, `now` is for people who read the object. `address`: where this candidate answers HTTP requests;
    empty: others wait for the whole duration."""

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
        self._observed: Observation | None = None
        self._mine: Object | None = None
        """The Lease as last written by this holder."""
        self._renewed = float("-inf")
        """Send time of the last successful renewal."""
        self._changed = asyncio.Event()
        """Set when the Lease is renewed or lost."""
        self._logged = ""

    @property
    def held(self) -> bool:
        """True while no other candidate can hold it. Check before each write: the process may have been stopped."""
        return self._mine is not None and self._clock() < self._renewed + FRESH * self._duration

    async def surely_held(self) -> bool:
        """Wait until no other candidate can hold it; False: it is lost."""
        while not self.held:
            if self._mine is None:
                return False
            await self._changed.wait()
        return True

    async def acquire(self) -> int:
        """Wait for the Lease and take it. Returns the epoch, higher than that of any earlier holder."""
        while True:
            try:
                pause = await self._try_to_take()
            except (ApiError, TimeoutError) as error:
                self._log_once(error)
                pause = LOOK * self._duration
            if self._mine is not None:
                return self._mine["spec"]["leaseTransitions"] + 1
            await asyncio.sleep(pause)

    async def hold(self) -> None:
        """Renew the Lease until cancelled. Raises LeaseLost if that fails."""
        while True:
            await asyncio.sleep(max(0.0, self._renewed + RENEWAL * self._duration - self._clock()))
            if self._mine is None or self._clock() >= self._renewed + DEADLINE * self._duration:
                raise self._lost("the Lease was not renewed in time")
            try:
                async with asyncio.timeout(self._renewed + DEADLINE * self._duration - self._clock()):
                    self._mine = await self._renewed_after(self._mine)
            except TimeoutError:
                raise self._lost("the Lease could not be renewed in time") from None

    async def release(self) -> None:
        """Release the Lease, so that no candidate has to wait. Call it after all work has stopped."""
        mine, self._mine = self._mine, None
        self._notify()
        try:
            while mine is not None:
                try:
                    await self._write({**mine, "spec": {**mine["spec"], "holderIdentity": ""}})
                    return
                except ApiError as error:
                    if error.status != 409:
                        raise
                    mine = await self._find_mine(mine)  # the answer to the last renewal may be lost
        except (ApiError, TimeoutError, LeaseLost) as error:
            self._log_once(error)  # it expires by itself

    async def _try_to_take(self) -> float:
        """Take the Lease if it is free; otherwise return the seconds until the next check."""
        found = await self._find()
        if found is None:
            await self._take({"metadata": {"name": self._name}})
            return 0.0
        version, now = found["metadata"]["resourceVersion"], self._clock()
        if self._observed is None or self._observed.version != version:
            self._observed = Observation(version, now)
        spec = _spec(found)
        left = self._observed.since + max(self._duration, spec.get("leaseDurationSeconds") or 0) - now
        if spec.get("holderIdentity") and left > 0 and not await self._is_unanswered(found, self._observed.since):
            return min(left, LOOK * self._duration)
        await self._take(found)
        return 0.0

    async def _is_unanswered(self, found: Object, since: float) -> bool:
        """Tell whether the holder is gone: no renewal for UNANSWERED, and no answer at its address."""
        duration = max(self._duration, _spec(found).get("leaseDurationSeconds") or 0)
        address = _annotations(found).get(ADDRESS)
        if not address or self._clock() < since + (UNANSWERED - DIAL) * duration:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DIAL * duration):
                if address != self._address and await self._answers(address):  # else: an earlier self
                    return False
        await asyncio.sleep(max(0.0, since + UNANSWERED * duration - self._clock()))
        return True

    async def _take(self, found: Object) -> None:
        """Write this candidate as the holder. Without a confirmed write it does not hold the Lease."""
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
            if error.status != 409:  # AlreadyExists or Conflict: another candidate won
                raise
            return
        self._renewed = sent
        self._notify()
        self._logged = ""

    async def _renewed_after(self, mine: Object) -> Object:
        """Renew the Lease, retrying errors. Raises LeaseLost if another candidate has it."""
        while True:
            sent = self._clock()
            try:
                renewed = await self._write({**mine, "spec": {**mine["spec"], "renewTime": _micro_time(self._now())}})
            except (ApiError, TimeoutError) as error:
                self._log_once(error)
                if isinstance(error, ApiError) and error.status in (404, 409):
                    with contextlib.suppress(ApiError, TimeoutError):
                        mine = await self._find_mine(mine)
                await asyncio.sleep(max(0.0, sent + RETRY * self._duration - self._clock()))
                continue
            self._renewed = sent
            self._notify()
            self._logged = ""
            return renewed

    async def _find_mine(self, mine: Object) -> Object:
        """Return the current Lease, changed by a renewal whose answer was lost or by a person. Raises LeaseLost if
        another candidate holds it."""
        found = await self._find()
        spec = _spec(found or {})
        if found is None or any(spec.get(key) != mine["spec"][key] for key in ("holderIdentity", "leaseTransitions")):
            raise self._lost(f"the Lease is held by {spec.get('holderIdentity') or 'nobody'}")
        return found

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _lost(self, message: str) -> LeaseLost:
        self._mine = None
        self._notify()
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

    def _log_once(self, error: Exception) -> None:
        """Log an error once while it repeats."""
        text = str(error) or "the API server does not answer"
        if text != self._logged:
            self._logged = text
            log.warning("lease call failed", lease=self._name, error=text)


def _spec(lease: Object) -> Object:
    return lease.get("spec") or {}


def _annotations(lease: Object) -> dict[str, str]:
    return lease["metadata"].get("annotations") or {}


def _next_transitions(lease: Object, now: datetime) -> int:
    """Return the next count of transitions. A new Lease starts at the minutes since 1970: more than a deleted
    predecessor reached, unless that changed hands every minute. Agents that outlive it refuse a lower epoch."""
    before = _spec(lease).get("leaseTransitions")
    return int(now.timestamp() // 60) if before is None else before + 1


def _micro_time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
