"""Informer: a cache of one kind of object, kept current by a list and a watch."""

from __future__ import annotations

import asyncio
import contextlib
import random as randomness
import time
from collections.abc import Callable, Iterable

import structlog

from pretrain_api.backoff import Retries
from pretrain_operator.kubernetes.client.api import BACKOFF, Api, ApiError, Object, Resource

WATCH_SECONDS = 30
"""Duration of one watch. Short, so that a watch that died unnoticed is replaced soon."""
BUSY = frozenset({0, 429, 500, 502, 503})
"""Statuses after which the watch resumes at its resource version."""
WATCH_TRIES = 3
"""Failures in a row after which the resource version is dropped and everything is listed again."""

log = structlog.get_logger()
Handler = Callable[[str, Object], None]
Key = tuple[str, str]


def no_values(_: Object) -> Iterable[str]:
    """Index no object."""
    return ()


def without_bulk(object_: Object) -> Object:
    """Drop field ownership and a node's images, which nobody reads and which are most of the memory."""
    object_["metadata"].pop("managedFields", None)
    object_.get("status", {}).pop("images", None)
    return object_


def metadata_only(object_: Object) -> Object:
    """Keep the metadata alone, for handlers that hold on to the object themselves."""
    return {"metadata": {key: value for key, value in object_["metadata"].items() if key != "managedFields"}}


class Informer:
    """Cache of the objects of one kind. `get`, `indexed` and `all` never wait. Objects are shared: do not modify them.

    `keep` chooses what is cached of an object; handlers receive the whole. Handlers are called in the event loop, after
    the cache is updated, once per change: ADDED, MODIFIED, DELETED (with the cached object). A recreated object of the
    same name is DELETED and then ADDED, even if that happened during a gap in the watch. An exception from a handler
    or the index is a bug and ends `run`, after which the cache is stale: supervise it."""

    def __init__(
        self,
        api: Api,
        resource: Resource,
        namespace: str | None,
        *,
        label_selector: str = "",
        index: Callable[[Object], Iterable[str]] = no_values,
        keep: Callable[[Object], Object] = without_bulk,
        watch_seconds: int = WATCH_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = randomness.random,
    ) -> None:
        self._api = api
        self._resource = resource
        self._namespace = namespace
        self._label_selector = label_selector
        self._keep = keep
        self._watch_seconds = watch_seconds
        self._clock = clock
        self._retries = Retries(BACKOFF, random)
        self._store = Store(index)
        self._handlers: list[Handler] = []
        self._version = ""
        """Resource version to watch from; empty: list first."""
        self._synced = asyncio.Event()
        self._confirmed_at = clock()
        self._logged = ""

    def subscribe(self, handler: Handler) -> None:
        """Call the handler for every further change; subscribed before `run`, for every object."""
        self._handlers.append(handler)

    async def run(self) -> None:
        """List and watch until cancelled, whatever the API server answers."""
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
            except ApiError as error:
                pause = self._retries.delay(at_least=error.retry_after)
                if error.status not in BUSY or self._retries.errors >= WATCH_TRIES:
                    self._version = ""
                self._log_once(error)
                await asyncio.sleep(pause)

    async def synced(self) -> None:
        """Return when the first list is in the cache."""
        await self._synced.wait()

    @property
    def is_synced(self) -> bool:
        """True once the first list is in the cache."""
        return self._synced.is_set()

    def get(self, namespace: str | None, name: str) -> Object | None:
        """Return the object of this name, or None."""
        return self._store.get((namespace or "", name))

    def indexed(self, value: str) -> tuple[Object, ...]:
        """Return the objects with this index value."""
        return self._store.indexed(value)

    def all(self) -> tuple[Object, ...]:
        """Return all objects."""
        return self._store.all()

    @property
    def age(self) -> float:
        """Seconds since the API server last confirmed the cache. Healthy below the duration of two watches."""
        return self._clock() - self._confirmed_at

    async def _list(self) -> None:
        objects, version = await self._api.list(self._resource, self._namespace, label_selector=self._label_selector)
        self._confirm(version)
        found = {_key(object_): object_ for object_ in objects}
        for key in self._store.keys() - found.keys():
            self._removed(key)
        for object_ in found.values():
            self._present(object_)
        self._synced.set()

    async def _watch(self) -> None:
        """Follow one watch to its end."""
        began, said = self._clock(), False
        stream = self._api.watch(
            self._resource,
            self._namespace,
            label_selector=self._label_selector,
            resource_version=self._version,
            timeout_seconds=self._watch_seconds,
        )
        async with contextlib.aclosing(stream):
            async for type_, object_ in stream:
                said = True
                self._confirm(object_["metadata"]["resourceVersion"])
                self._recovered()
                if type_ in ("ADDED", "MODIFIED"):
                    self._present(object_)
                elif type_ == "DELETED":
                    self._removed(_key(object_))
        if not said and self._clock() - began < 1.0:
            raise ApiError(0, "ShortWatch", "the API server ended a watch at once")
        self._confirm(self._version)
        self._recovered()

    def _present(self, object_: Object) -> None:
        """Cache an object that exists."""
        key = _key(object_)
        before = self._store.get(key)
        if before is not None and _uid(before) != _uid(object_):
            self._removed(key)
            before = None
        if before is not None and _version(before) == _version(object_):
            return
        self._store.put(key, self._keep(object_))
        self._notify("MODIFIED" if before is not None else "ADDED", object_)

    def _removed(self, key: Key) -> None:
        """Drop an object that no longer exists."""
        before = self._store.pop(key)
        if before is not None:
            self._notify("DELETED", before)

    def _notify(self, type_: str, object_: Object) -> None:
        for handler in self._handlers:
            handler(type_, object_)

    def _confirm(self, version: str) -> None:
        self._version = version
        self._confirmed_at = self._clock()

    def _recovered(self) -> None:
        self._retries.succeeded()
        self._logged = ""

    def _log_once(self, error: ApiError) -> None:
        """Log an error once while it repeats. An expired watch (410) is normal."""
        if error.status != 410 and str(error) != self._logged:
            self._logged = str(error)
            log.warning("watch interrupted", resource=self._resource.plural, reason=error.reason, error=str(error))


class Store:
    """Objects by name and by index value."""

    def __init__(self, index: Callable[[Object], Iterable[str]]) -> None:
        self._index = index
        self._objects: dict[Key, tuple[Object, tuple[str, ...]]] = {}
        self._by_value: dict[str, dict[Key, Object]] = {}

    def get(self, key: Key) -> Object | None:
        """Return the object of this name, or None."""
        held = self._objects.get(key)
        return held[0] if held is not None else None

    def put(self, key: Key, object_: Object) -> None:
        """Add the object, replacing the one of its name."""
        values = tuple(self._index(object_))
        self.pop(key)
        self._objects[key] = (object_, values)
        for value in values:
            self._by_value.setdefault(value, {})[key] = object_

    def pop(self, key: Key) -> Object | None:
        """Remove the object of this name and return it."""
        held = self._objects.pop(key, None)
        if held is None:
            return None
        object_, values = held
        for value in set(values):
            named = self._by_value[value]
            del named[key]
            if not named:
                del self._by_value[value]
        return object_

    def indexed(self, value: str) -> tuple[Object, ...]:
        """Return the objects with this index value."""
        return tuple(self._by_value.get(value, {}).values())

    def all(self) -> tuple[Object, ...]:
        """Return all objects."""
        return tuple(object_ for object_, _ in self._objects.values())

    def keys(self) -> set[Key]:
        """Return all names."""
        return set(self._objects)


def _key(object_: Object) -> Key:
    metadata = object_["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def _uid(object_: Object) -> str:
    return object_["metadata"]["uid"]


def _version(object_: Object) -> str:
    return object_["metadata"]["resourceVersion"]
