"""Client of the API server in raw JSON: few verbs, one error. Typed models refuse or drop unknown fields.

OSError
└── ApiError    refused by the API server (`status`, `reason`), or no answer (`status` 0)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import quote, urlencode

import aiohttp

from pretrain_api.backoff import Backoff
from pretrain_operator.kubernetes.client.transport import Transport

PAGE = 500
CALL_SECONDS = 15.0
"""Time limit of one call, answer included."""
WATCH_GRACE_SECONDS = 5.0
"""Silence after the expected end of a watch that makes it count as hung."""
BUSY_TRIES = 4
"""Attempts of a call answered `429 Too Many Requests`."""
LONGEST_PAUSE_SECONDS = 10.0
URGENT_CALLS = 4
BACKOFF = Backoff(first=0.2, factor=2.0, most=5.0, jitter=1.0)
"""Of loops that depend on the API server. Full jitter: thousands of clients meet the same outage."""

Object = dict[str, Any]
"""An object in the API server's JSON."""
Listing = tuple[list[Object], str]
"""Objects, and the resource version to start a watch from."""


@dataclass(frozen=True)
class Resource:
    """Group, version and plural of a kind of object."""

    group: str
    """Empty: the core group."""
    version: str
    plural: str

    @property
    def api_version(self) -> str:
        """`apiVersion` of its objects."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        """Return the path of its objects; without a namespace: of all namespaces, or of cluster-scoped objects."""
        parts = ["apis" if self.group else "api", self.api_version]
        parts += ["namespaces", quote(namespace, safe="")] if namespace else []
        parts += [self.plural, quote(name, safe=""), subresource]
        return "/" + "/".join(part for part in parts if part)


JOBS = Resource("pretrain.dev", "v1alpha1", "pretrainjobs")
PODS = Resource("", "v1", "pods")
NODES = Resource("", "v1", "nodes")
CONFIG_MAPS = Resource("", "v1", "configmaps")
EVENTS = Resource("", "v1", "events")
LEASES = Resource("coordination.k8s.io", "v1", "leases")
NETWORK_POLICIES = Resource("networking.k8s.io", "v1", "networkpolicies")


class ApiError(OSError):
    """Refusal of the API server, or no answer (status 0)."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; 0: no answer, and the call may still have taken effect."""
        self.reason = reason
        """CamelCase: `NotFound`, `Conflict`, `AlreadyExists`, `Forbidden`, `Expired`, …"""
        self.message = message
        self.retry_after = retry_after
        """Seconds after which the API server allows a retry."""


class Lane:
    """Group of calls with a limit of `width` in flight."""

    def __init__(self, width: int) -> None:
        self.slots = asyncio.Semaphore(width)


def _uncounted(verb: str, code: str) -> None:
    pass


class Api:
    """Calls to one API server, at most `concurrency` in flight; calls on Leases have slots of their own. A call
    answered 429 is retried after the time that the server names. Every call raises ApiError only."""

    def __init__(self, transport: Transport, on_call: Callable[[str, str], None], concurrency: int) -> None:
        self._transport = transport
        self._on_call = on_call
        self._work = Lane(concurrency)
        self._leases = Lane(URGENT_CALLS)

    @classmethod
    async def connect(
        cls,
        *,
        kubeconfig: str | os.PathLike[str] | None = None,
        on_call: Callable[[str, str], None] = _uncounted,
        concurrency: int = 32,
    ) -> Api:
        """Connect to the cluster of the kubeconfig; without one: the cluster around this pod, else KUBECONFIG's.
        `on_call` is called for each request with its verb and HTTP status (`0`: no answer)."""
        return cls(await Transport.connect(kubeconfig), on_call, concurrency)

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        """Return one object."""
        return await self._call("get", "GET", resource.path(namespace, name), lane=self._lane(resource))

    async def list(self, resource: Resource, namespace: str | None, *, label_selector: str = "") -> Listing:
        """Return all objects and the resource version to watch from: a consistent read, not from a cache."""
        try:
            return await self._list(resource, namespace, label_selector, PAGE)
        except ApiError as error:
            if error.status != 410:
                raise
            return await self._list(resource, namespace, label_selector, 0)  # the continue token expired

    async def create(self, resource: Resource, namespace: str | None, body: Object) -> Object:
        """Create an object. Reason `AlreadyExists` if the name is taken."""
        path = _with_query(resource.path(namespace), fieldManager="pretrain-operator")
        return await self._call("create", "POST", path, body, lane=self._lane(resource))

    async def merge_patch(self, resource: Resource, namespace: str | None, name: str, body: Object) -> Object:
        """Apply a JSON merge patch: null removes a field."""
        path = _with_query(resource.path(namespace, name), fieldManager="pretrain-operator")
        return await self._call("patch", "PATCH", path, body, kind="application/merge-patch+json")

    async def replace(
        self, resource: Resource, namespace: str | None, name: str, body: Object, *, subresource: str = ""
    ) -> Object:
        """Replace the whole object. Reason `Conflict` if its `resourceVersion` has changed."""
        path = _with_query(resource.path(namespace, name, subresource), fieldManager="pretrain-operator")
        return await self._call("update", "PUT", path, body, lane=self._lane(resource))

    async def delete(
        self, resource: Resource, namespace: str | None, name: str, *, uid: str, grace_seconds: int | None = None
    ) -> None:
        """Delete the object with this uid. Succeeds if it is gone or its name belongs to another object."""
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        try:
            await self._call("delete", "DELETE", resource.path(namespace, name), options)
        except ApiError as error:
            another = error.status == 409 and uid in error.message  # the message names the uid that did not match
            if error.status != 404 and not another:
                raise

    async def watch(
        self,
        resource: Resource,
        namespace: str | None,
        *,
        label_selector: str = "",
        resource_version: str,
        timeout_seconds: int,
    ) -> AsyncGenerator[tuple[str, Object], None]:
        """Yield events after the resource version: ADDED, MODIFIED, DELETED, and BOOKMARK with a newer resource
        version only. Ends after the timeout; raises if it hangs, breaks or contains an ERROR event."""
        path = _with_query(
            resource.path(namespace),
            watch="true",
            allowWatchBookmarks="true",
            labelSelector=label_selector,
            resourceVersion=resource_version,
            timeoutSeconds=str(timeout_seconds),
        )
        with _translated():
            response = await self._send("watch", "GET", path, total=None, silence=timeout_seconds + WATCH_GRACE_SECONDS)
            try:
                async for line in _lines(response.content):
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise _refusal(int(event["object"].get("code") or 500), event["object"], None)
                    yield event["type"], event["object"]
            finally:
                response.close()

    async def read(self, path: str) -> Any:
        """Return the JSON at a path that is not a resource."""
        return await self._call("read", "GET", path)

    async def close(self) -> None:
        """Close all connections."""
        await self._transport.close()

    def _lane(self, resource: Resource) -> Lane:
        return self._leases if resource == LEASES else self._work

    async def _list(self, resource: Resource, namespace: str | None, label_selector: str, limit: int) -> Listing:
        items: list[Object] = []
        token = ""
        while True:
            page = {"labelSelector": label_selector, "limit": str(limit or ""), "continue": token}
            answer = await self._call("list", "GET", _with_query(resource.path(namespace), **page))
            kind, version = answer["kind"].removesuffix("List"), answer["apiVersion"]
            # items of a list lack apiVersion and kind, those of a watch have them
            items += [{"apiVersion": version, "kind": kind, **item} for item in answer["items"] or ()]
            token = answer["metadata"].get("continue", "")
            if not token:
                return items, answer["metadata"]["resourceVersion"]

    async def _call(
        self,
        verb: str,
        method: str,
        path: str,
        body: Object | None = None,
        *,
        kind: str = "application/json",
        lane: Lane | None = None,
    ) -> Any:
        """Make a call within its lane; retry 429, which the server sends before it acts."""
        lane = lane or self._work
        async with lane.slots:
            tries = 0
            while True:
                try:
                    return await self._call_once(verb, method, path, body, kind)
                except ApiError as error:
                    tries += 1
                    if error.status != 429 or tries == BUSY_TRIES:
                        raise
                    await asyncio.sleep(min(error.retry_after or 1.0, LONGEST_PAUSE_SECONDS))

    async def _call_once(self, verb: str, method: str, path: str, body: Object | None, kind: str) -> Any:
        with _translated():
            response = await self._send(verb, method, path, body, kind, total=CALL_SECONDS, silence=CALL_SECONDS)
            async with response:
                return json.loads(await response.read())

    async def _send(
        self,
        verb: str,
        method: str,
        path: str,
        body: Object | None = None,
        kind: str = "application/json",
        *,
        total: float | None,
        silence: float,
    ) -> aiohttp.ClientResponse:
        """Return the head of a successful answer."""
        headers = {"Content-Type": kind}
        code = 0
        try:
            response = await self._transport.request(method, path, headers, body, total=total, silence=silence)
            code = response.status
        finally:
            self._on_call(verb, str(code))
        if code < 400:
            return response
        async with response:
            raise _refusal(code, await response.read(), response.headers.get("Retry-After"))


def _with_query(path: str, **values: str) -> str:
    query = urlencode({key: value for key, value in values.items() if value})
    return f"{path}?{query}" if query else path


def _refusal(status: int, answer: bytes | Object, retry_after: str | None) -> ApiError:
    """Return the error of an answer, from its `Status` object if there is one."""
    said: Object = {}
    text = ""
    if isinstance(answer, dict):
        said = answer
    else:
        text = answer.decode(errors="replace").strip()
        with contextlib.suppress(ValueError):
            parsed = json.loads(text)
            said = cast(Object, parsed) if isinstance(parsed, dict) else {}
    message = said.get("message") or text[:500] or f"the API server answered {status}"
    details: Object = said.get("details") or {}
    try:
        pause = float(retry_after or details.get("retryAfterSeconds") or 0) or None
    except ValueError:  # an HTTP date, which the API server does not send
        pause = None
    return ApiError(status, said.get("reason") or f"Http{status}", message, pause)


@contextlib.contextmanager
def _translated() -> Generator[None]:
    """Translate every failure of the connection into ApiError with status 0."""
    try:
        yield
    except ApiError:
        raise
    except TimeoutError as error:
        raise ApiError(0, "Timeout", "timeout: the API server does not answer") from error
    except (aiohttp.ClientError, OSError) as error:
        cause = str(error) or type(error).__name__
        raise ApiError(0, "Unreachable", f"the API server cannot be reached: {cause}") from error
    except ValueError as error:
        raise ApiError(0, "Garbled", f"the API server's answer is not JSON: {error}") from error


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Yield lines of any length. Raises ValueError if the last one is incomplete."""
    parts: list[bytes] = []
    async for chunk in content.iter_any():
        head, *rest = chunk.split(b"\n")
        parts.append(head)
        for part in rest:
            if line := b"".join(parts):
                yield line
            parts = [part]
    if any(parts):
        raise ValueError("the last line is cut off")
