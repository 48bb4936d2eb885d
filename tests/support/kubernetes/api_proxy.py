"""A proxy in front of a real API server that breaks what passes through it: for faults that a healthy server never
shows. What is not broken on purpose goes through unchanged, watches line by line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import aiohttp
from aiohttp import web
from kubernetes.aio.client import Configuration
from kubernetes.aio.config import load_kube_config
from yarl import URL

Where = Literal["before", "after", "answer lost"]
WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})


@dataclass(frozen=True)
class Call:
    """A request that came."""

    method: str
    path: str
    """With its query."""

    @property
    def watch(self) -> bool:
        return "watch=true" in self.path

    @property
    def write(self) -> bool:
        return self.method in WRITES


Matches = Callable[[Call], bool]


@dataclass(frozen=True)
class Answer:
    """Answer so, without asking the API server."""

    status: int
    reason: str = ""
    message: str = ""
    retry_after: int | None = None

    def response(self) -> web.Response:
        """As HTTP."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after is not None else {}
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": self.status}
        status |= {"reason": self.reason, "message": self.message}
        return web.json_response(status, status=self.status, headers=headers)


@dataclass(frozen=True)
class Cut:
    """Break the connection: before the API server heard of the call, or in place of its answer."""

    where: Literal["before", "answer lost"] = "before"


@dataclass(frozen=True)
class Hang:
    """Hear the call, pass nothing on, never answer."""


Fault = Answer | Cut | Hang


@dataclass(frozen=True)
class Stream:
    """A watch that is open."""

    response: web.StreamResponse
    connection: asyncio.Transport
    flows: asyncio.Event
    """Unset: what the API server sends is held back."""
    ended: asyncio.Event


class ApiProxy:
    """Faults are planned ahead (`plan`, `cut_at_write`) or done to watches that are open (`say_error`, `freeze`,
    `reset`). Use `api_proxy` to get one."""

    def __init__(self, kubeconfig: Path, upstream: Upstream) -> None:
        self.kubeconfig = kubeconfig
        """For clients: through the proxy, as the administrator."""
        self.calls: list[Call] = []
        """All that came, in order, those included that did not get through."""
        self.cut_off = asyncio.Event()
        """`cut_at_write` has struck: nobody is served."""
        self._upstream = upstream
        self._planned: list[tuple[Matches, Fault]] = []
        self._streams: list[Stream] = []
        self._cut: tuple[int, Where] | None = None
        self._writes = 0
        self._changed = asyncio.Condition()

    @property
    def writes(self) -> tuple[Call, ...]:
        """The calls that write."""
        return tuple(call for call in self.calls if call.write)

    def plan(self, fault: Fault, when: Matches, *, times: int = 1) -> None:
        """Do this to the next calls that match; of several faults that match the first planned strikes."""
        self._planned += [(when, fault)] * times

    def cut_at_write(self, number: int, where: Where) -> None:
        """At the number-th write from now on (1 is the next) cut everybody off until `heal`: before the write reaches
        the API server, after its answer arrived, or when it was done but its answer is lost."""
        self._writes, self._cut = 0, (number, where)
        self.cut_off.clear()

    def heal(self) -> None:
        """Nothing is planned any more; whoever connects is served."""
        self._planned.clear()
        self._cut = None
        self.cut_off.clear()

    async def heard(self, matches: Matches, count: int = 1) -> None:
        """Return when so many calls that match have come."""
        async with self._changed:
            await self._changed.wait_for(lambda: sum(map(matches, self.calls)) >= count)

    async def watching(self, count: int = 1) -> None:
        """Return when so many watches are open."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._streams) >= count)

    async def say_error(self, code: int, reason: str) -> None:
        """Say ERROR in every open watch and end it."""
        status = {"kind": "Status", "apiVersion": "v1", "code": code, "reason": reason, "message": f"{reason}, it says"}
        line = json.dumps({"type": "ERROR", "object": status}).encode() + b"\n"
        for stream in tuple(self._streams):
            await stream.response.write(line)
            stream.ended.set()

    async def cut_line(self) -> None:
        """Say half a line in every open watch and end it in good order."""
        for stream in tuple(self._streams):
            await stream.response.write(b'{"type":"MODIFIED","obj')
            stream.ended.set()

    def freeze(self) -> None:
        """Open watches stay open and say nothing more; what happened stays unheard."""
        for stream in self._streams:
            stream.flows.clear()

    def reset(self) -> None:
        """Break the connections of open watches."""
        for stream in tuple(self._streams):
            stream.connection.abort()
            stream.ended.set()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Serve one request, or don't."""
        call = Call(request.method, request.path_qs)
        async with self._changed:
            self.calls.append(call)
            self._changed.notify_all()
        if self.cut_off.is_set():
            return _broken(request)
        cut = self._cut_for(call)
        if cut == "before":
            self._cut_off()
            return _broken(request)
        match self._planned_for(call):
            case Answer() as answer:
                return answer.response()
            case Hang():
                await asyncio.Event().wait()
            case Cut("before"):
                return _broken(request)
            case Cut("answer lost"):
                await self._upstream.answer(request)
                return _broken(request)
            case None:
                pass
        if call.watch:
            return await self._stream(request)
        answer = await self._upstream.answer(request)
        if cut is not None:
            self._cut_off()
        return _broken(request) if self.cut_off.is_set() and cut != "after" else answer

    def _cut_for(self, call: Call) -> Where | None:
        if not call.write or self._cut is None:
            return None
        self._writes += 1
        number, where = self._cut
        return where if self._writes == number else None

    def _cut_off(self) -> None:
        self.cut_off.set()
        self.reset()

    def _planned_for(self, call: Call) -> Fault | None:
        for at, (when, fault) in enumerate(self._planned):
            if when(call):
                del self._planned[at]
                return fault
        return None

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        async with self._upstream.request(request) as upstream:
            if upstream.status != 200:
                return web.Response(status=upstream.status, body=await upstream.read(), headers=_passed(upstream))
            response = web.StreamResponse(headers=_passed(upstream))
            await response.prepare(request)
            assert request.transport is not None
            stream = Stream(response, request.transport, asyncio.Event(), asyncio.Event())
            stream.flows.set()
            pump = asyncio.create_task(_pump(upstream, stream))
            ended = asyncio.create_task(stream.ended.wait())
            await self._note(stream, open_=True)
            try:
                await asyncio.wait((pump, ended), return_when=asyncio.FIRST_COMPLETED)
            finally:
                pump.cancel()
                ended.cancel()
                await self._note(stream, open_=False)
            return response

    async def _note(self, stream: Stream, *, open_: bool) -> None:
        async with self._changed:
            if open_:
                self._streams.append(stream)
            else:
                self._streams.remove(stream)
            self._changed.notify_all()


class Upstream:
    """The real API server; who does not say who he is, is the administrator."""

    def __init__(self, host: str, session: aiohttp.ClientSession, authorization: str) -> None:
        self._host = host
        self._session = session
        self._authorization = authorization

    @contextlib.asynccontextmanager
    async def request(self, request: web.Request) -> AsyncIterator[aiohttp.ClientResponse]:
        """The same request, there."""
        headers = {"Authorization": self._authorization, **_passed(request)}
        body = await request.read()
        url = URL(self._host + request.raw_path, encoded=True)
        async with self._session.request(request.method, url, headers=headers, data=body or None) as response:
            yield response

    async def answer(self, request: web.Request) -> web.Response:
        """Its whole answer."""
        async with self.request(request) as response:
            return web.Response(status=response.status, body=await response.read(), headers=_passed(response))


@contextlib.asynccontextmanager
async def api_proxy(kubeconfig: Path, folder: Path) -> AsyncIterator[ApiProxy]:
    """A proxy in front of the API server that the kubeconfig names; the folder takes the proxy's own kubeconfig."""
    configuration = Configuration()
    await load_kube_config(str(kubeconfig), client_configuration=configuration)
    trust = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
    connector = aiohttp.TCPConnector(ssl=trust, limit=0)
    forever = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=connector, auto_decompress=False, timeout=forever, read_bufsize=2**24
    ) as session:
        upstream = Upstream(configuration.host, session, configuration.api_key["BearerToken"])
        proxy = ApiProxy(folder / "proxy.kubeconfig", upstream)
        application = web.Application(client_max_size=2**24)
        application.router.add_route("*", "/{path:.*}", proxy.handle)
        runner = web.AppRunner(application, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            write_kubeconfig(proxy.kubeconfig, f"http://127.0.0.1:{runner.addresses[0][1]}")
            yield proxy
        finally:
            await runner.cleanup()


def write_kubeconfig(path: Path, server: str) -> None:
    """Of nobody in particular."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "proxy", "cluster": {"server": server}}],
        "users": [{"name": "nobody", "user": {}}],
        "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "nobody"}}],
        "current-context": "proxy",
    }
    path.write_text(json.dumps(content))


async def _pump(upstream: aiohttp.ClientResponse, stream: Stream) -> None:
    """Pass a watch on, line by line, while it flows."""
    while line := await upstream.content.readline():
        await stream.flows.wait()
        await stream.response.write(line)


def _passed(message: web.Request | aiohttp.ClientResponse) -> dict[str, str]:
    hop = {"host", "content-length", "transfer-encoding", "connection", "date"}
    return {name: value for name, value in message.headers.items() if name.lower() not in hop}


def _broken(request: web.Request) -> web.Response:
    """Nothing: the connection is reset."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)
