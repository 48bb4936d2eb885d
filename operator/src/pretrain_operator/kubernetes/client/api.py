"""The API server in raw JSON: few verbs, one error. Typed models would refuse or drop what they do not know.

OSError
└── ApiError    the API server said no (`status`, `reason`), or could not be reached (`status` 0)
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

from pretrain_operator.kubernetes.client.transport import Transport

PAGE = 500
CALL_SECONDS = 15.0
"""For one call, its answer included."""
WATCH_GRACE_SECONDS = 5.0
"""A watch that says nothing for so long after it should have ended hangs."""
BUSY_TRIES = 4
"""How often a call is made that is answered `429 Too Many Requests`."""
LONGEST_PAUSE_SECONDS = 10.0
URGENT_CALLS = 4

Object = dict[str, Any]
"""One object as the API server sends it."""
Listing = tuple[list[Object], str]
"""Objects, and the resource version to watch from."""


@dataclass(frozen=True)
class Resource:
    """A kind of object, as the API server's paths name it."""

    group: str
    """Empty: the core group."""
    version: str
    plural: str

    @property
    def api_version(self) -> str:
        """As in an object's `apiVersion`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        """Where its objects are; no namespace: all namespaces, or objects that have none."""
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
    """The API server refused, or did not answer (status 0)."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        """Of HTTP; 0: no answer. What was asked for may have been done all the same."""
        self.reason = reason
        """CamelCase: `NotFound`, `Conflict`, `AlreadyExists`, `Forbidden`, `Expired`, …"""
        self.message = message
        self.retry_after = retry_after
        """Seconds that the API server asks to be left alone."""


class Lane:
    """Calls that wait for each other: at most so many at a time."""

    def __init__(self, width: int) -> None:
        self.slots = asyncio.Semaphore(width)


def _uncounted(verb: str, code: str) -> None:
    pass


class Api:
    """Calls to one API server. At most `concurrency` of them are under way; those on Leases do not queue behind the
    others. A call that is refused because the server is busy is made again when the server asks for it.
    Every call raises ApiError, and nothing else."""

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
        """To the cluster that the kubeconfig names; without one: the cluster around this pod, else KUBECONFIG's.
        `on_call` hears of each request: its verb and the answer's HTTP status (`0`: none)."""
        return cls(await Transport.connect(kubeconfig), on_call, concurrency)

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        """One object."""
        return await self._call("get", "GET", resource.path(namespace, name), lane=self._lane(resource))

    async def list(self, resource: Resource, namespace: str | None, *, label_selector: str = "") -> Listing:
        """All objects and the resource version to watch from. Never older than what was written before the call."""
        try:
            return await self._list(resource, namespace, label_selector, PAGE)
        except ApiError as error:
            if error.status != 410:
                raise
            return await self._list(resource, namespace, label_selector, 0)  # it took longer than pages are kept

    async def create(self, resource: Resource, namespace: str | None, body: Object) -> Object:
        """Make an object; `AlreadyExists` if one has its name."""
        path = _with_query(resource.path(namespace), fieldManager="pretrain-operator")
        return await self._call("create", "POST", path, body, lane=self._lane(resource))

    async def apply(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        body: Object,
        *,
        field_manager: str = "pretrain-operator",
    ) -> Object:
        """Server-side apply: the fields of the body are ours from now on, whoever had them."""
        path = _with_query(resource.path(namespace, name), fieldManager=field_manager, force="true")
        return await self._call("apply", "PATCH", path, body, kind="application/apply-patch+yaml")

    async def merge_patch(self, resource: Resource, namespace: str | None, name: str, body: Object) -> Object:
        """JSON merge patch: null removes a field."""
        path = _with_query(resource.path(namespace, name), fieldManager="pretrain-operator")
        return await self._call("patch", "PATCH", path, body, kind="application/merge-patch+json")

    async def replace(
        self, resource: Resource, namespace: str | None, name: str, body: Object, *, subresource: str = ""
    ) -> Object:
        """Write the whole object; `Conflict` if it is no longer at the body's `resourceVersion`."""
        path = _with_query(resource.path(namespace, name, subresource), fieldManager="pretrain-operator")
        return await self._call("update", "PUT", path, body, lane=self._lane(resource))

    async def delete(
        self, resource: Resource, namespace: str | None, name: str, *, uid: str, grace_seconds: int | None = None
    ) -> None:
        """Delete the object with this uid. That it is gone, or that another one has its name, is success."""
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        try:
            await self._call("delete", "DELETE", resource.path(namespace, name), options)
        except ApiError as error:
            another = error.status == 409 and uid in error.message  # it names the uid that did not match
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
        """What happens after the resource version: ADDED, MODIFIED, DELETED, and BOOKMARK with nothing but a newer
        resource version. Ends after the timeout; raises when it hangs, breaks off, or the server says ERROR in it."""
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
        """The JSON at a path that is no resource."""
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
            # a list's items do not say what they are, a watch's do
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
        """Make a call in its turn, again while the server is busy, which it says before it has done anything."""
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
        """The head of an answer that is not an error."""
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
    """What the API server said, from a `Status` object if it sent one."""
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
    except ValueError:  # a date, which the API server never sends
        pause = None
    return ApiError(status, said.get("reason") or f"Http{status}", message, pause)


@contextlib.contextmanager
def _translated() -> Generator[None]:
    """Everything that keeps an answer from arriving whole is an ApiError of status 0."""
    try:
        yield
    except ApiError:
        raise
    except TimeoutError as error:
        raise ApiError(0, "Timeout", "the API server does not answer") from error
    except (aiohttp.ClientError, OSError) as error:
        cause = str(error) or type(error).__name__
        raise ApiError(0, "Unreachable", f"the API server cannot be reached: {cause}") from error
    except ValueError as error:
        raise ApiError(0, "Garbled", f"the API server's answer is not JSON: {error}") from error


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length. Raises ValueError when the last one is not whole."""
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
