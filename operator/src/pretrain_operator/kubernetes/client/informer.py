"""What the API server holds of one kind of object, kept current by a list and a watch."""

from __future__ import annotations

import asyncio
import contextlib
import random as randomness
import time
from collections.abc import Callable, Iterable

import structlog

from pretrain_operator.kubernetes.client.api import Api, ApiError, Object, Resource
from pretrain_operator.kubernetes.client.backoff import Backoff

WATCH_SECONDS = 30
"""After which the API server ends a watch and the next one begins: one that has died unnoticed is found out soon."""
BUSY = frozenset({0, 429, 500, 502, 503})
"""Answers after which the watch can go on where it was."""
WATCH_TRIES = 3
"""A resource version from which no watch comes about so many times is given up: everything is listed again."""

log = structlog.get_logger()
Handler = Callable[[str, Object], None]
Key = tuple[str, str]


def no_values(_: Object) -> Iterable[str]:
    """Objects are in no index."""
    return ()


class Informer:
    """The objects of one kind, as far as heard: `get`, `indexed` and `all` never wait. Objects are shared and must not
    be changed by those who read them. They lack what nobody reads: who wrote which field, and a node's images.

    Handlers are called in the event loop, after the change can be read here, once per change: ADDED, MODIFIED, DELETED
    (with the object as last known). An object that was replaced by another of its name is DELETED and then ADDED,
    whether or not the watch was up when it happened. What a handler or the index raises is a bug and ends `run`:
    supervise it, for from then on nothing here is kept current."""

    def __init__(
        self,
        api: Api,
        resource: Resource,
        namespace: str | None,
        *,
        label_selector: str = "",
        index: Callable[[Object], Iterable[str]] = no_values,
        watch_seconds: int = WATCH_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = randomness.random,
    ) -> None:
        self._api = api
        self._resource = resource
        self._namespace = namespace
        self._label_selector = label_selector
        self._watch_seconds = watch_seconds
        self._clock = clock
        self._backoff = Backoff(random)
        self._store = Store(index)
        self._handlers: list[Handler] = []
        self._version = ""
        """To watch from; empty: a list is due."""
        self._listed = asyncio.Event()
        self._heard = clock()
        self._complaint = ""

    def subscribe(self, handler: Handler) -> None:
        """Call the handler with every change from now on; before `run`, that is every object."""
        self._handlers.append(handler)

    async def run(self) -> None:
        """List and watch for ever, whatever the API server answers."""
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
            except ApiError as error:
                pause = self._backoff.delay(at_least=error.retry_after)
                if error.status not in BUSY or self._backoff.errors >= WATCH_TRIES:
                    self._version = ""
                self._complain(error)
                await asyncio.sleep(pause)

    async def synced(self) -> None:
        """Return when the first list has been taken in."""
        await self._listed.wait()

    @property
    def is_synced(self) -> bool:
        """The first list has been taken in."""
        return self._listed.is_set()

    def get(self, namespace: str | None, name: str) -> Object | None:
        """The object of this name, if there is one."""
        return self._store.get((namespace or "", name))

    def indexed(self, value: str) -> tuple[Object, ...]:
        """The objects for which the index gives this value."""
        return self._store.indexed(value)

    def all(self) -> tuple[Object, ...]:
        """All objects."""
        return self._store.all()

    @property
    def age(self) -> float:
        """Seconds since the API server was last heard to say what there is, or that nothing has changed. In order
        while it is below two watches' time."""
        return self._clock() - self._heard

    async def _list(self) -> None:
        objects, version = await self._api.list(self._resource, self._namespace, label_selector=self._label_selector)
        self._hear(version)
        found = {_key(object_): object_ for object_ in objects}
        for key in self._store.keys() - found.keys():
            self._removed(key)
        for object_ in found.values():
            self._present(object_)
        self._listed.set()

    async def _watch(self) -> None:
        """Follow one watch to its end, which comes by itself."""
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
                self._hear(object_["metadata"]["resourceVersion"])
                self._recovered()
                if type_ in ("ADDED", "MODIFIED"):
                    self._present(object_)
                elif type_ == "DELETED":
                    self._removed(_key(object_))
        if not said and self._clock() - began < 1.0:
            raise ApiError(0, "ShortWatch", "the API server ended a watch as soon as it had begun")
        self._hear(self._version)
        self._recovered()

    def _present(self, object_: Object) -> None:
        """The object exists as it is here."""
        _shed(object_)
        key = _key(object_)
        before = self._store.get(key)
        if before is not None and _uid(before) != _uid(object_):
            self._removed(key)
            before = None
        if before is not None and _version(before) == _version(object_):
            return
        self._store.put(key, object_)
        self._tell("MODIFIED" if before is not None else "ADDED", object_)

    def _removed(self, key: Key) -> None:
        """There is no object of this name."""
        before = self._store.pop(key)
        if before is not None:
            self._tell("DELETED", before)

    def _tell(self, type_: str, object_: Object) -> None:
        for handler in self._handlers:
            handler(type_, object_)

    def _hear(self, version: str) -> None:
        self._version = version
        self._heard = self._clock()

    def _recovered(self) -> None:
        self._backoff.succeeded()
        self._complaint = ""

    def _complain(self, error: ApiError) -> None:
        """Log an error, once however often it comes again in a row. An expired watch is in order."""
        if error.status != 410 and str(error) != self._complaint:
            self._complaint = str(error)
            log.warning("watch interrupted", resource=self._resource.plural, reason=error.reason, error=str(error))


class Store:
    """Objects by name and by the values of an index."""

    def __init__(self, index: Callable[[Object], Iterable[str]]) -> None:
        self._index = index
        self._objects: dict[Key, tuple[Object, tuple[str, ...]]] = {}
        self._by_value: dict[str, dict[Key, Object]] = {}

    def get(self, key: Key) -> Object | None:
        """The object of this name."""
        held = self._objects.get(key)
        return held[0] if held is not None else None

    def put(self, key: Key, object_: Object) -> None:
        """Keep the object, in place of the one that has its name."""
        values = tuple(self._index(object_))
        self.pop(key)
        self._objects[key] = (object_, values)
        for value in values:
            self._by_value.setdefault(value, {})[key] = object_

    def pop(self, key: Key) -> Object | None:
        """Forget the object of this name and return it."""
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
        """The objects with this value."""
        return tuple(self._by_value.get(value, {}).values())

    def all(self) -> tuple[Object, ...]:
        """All objects."""
        return tuple(object_ for object_, _ in self._objects.values())

    def keys(self) -> set[Key]:
        """All names."""
        return set(self._objects)


def _shed(object_: Object) -> None:
    """Drop what would be most of the memory."""
    object_["metadata"].pop("managedFields", None)
    object_.get("status", {}).pop("images", None)


def _key(object_: Object) -> Key:
    metadata = object_["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def _uid(object_: Object) -> str:
    return object_["metadata"]["uid"]


def _version(object_: Object) -> str:
    return object_["metadata"]["resourceVersion"]
