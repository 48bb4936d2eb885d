"""The WebSocket around the coordinators: one Channel a job, one connection an agent.

All of it runs in one event loop. A connection has a bounded queue of its own, so that an agent that does not read
delays nobody and is cut off when its queue is full.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable

from aiohttp import WSMsgType, web
from pydantic import ValidationError

from pretrain_api.messages.protocol import (
    AGENT_MESSAGE,
    Acked,
    AgentMessage,
    CoordinatorMessage,
    Error,
    Heartbeat,
    Hello,
    Report,
    Shutdown,
)
from pretrain_operator.coordinator.authentication import Authenticate, Caller, Refusal
from pretrain_operator.coordinator.machine import Coordinator, ShutdownReason
from pretrain_operator.coordinator.members import ConnectionId
from pretrain_operator.coordinator.output import Output
from pretrain_operator.coordinator.settings import Settings
from pretrain_operator.coordinator.types import CoordinatorView, Want
from pretrain_operator.facts.fact import CoordinatorFact, Reported, is_step

Clock = Callable[[], float]

QUEUE_LIMIT = 512
HELLO_SECONDS = 10.0
CLOSE_SECONDS = 1.0


def steady_clock() -> Clock:
    """A clock of unix seconds that never jumps: the wall clock of this moment, carried on by the monotonic one."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()


class Connection:
    """The way out to one agent."""

    def __init__(self, socket: web.WebSocketResponse, transport: asyncio.BaseTransport | None) -> None:
        self._socket = socket
        self._transport = transport
        self._queue: asyncio.Queue[CoordinatorMessage | None] = asyncio.Queue(QUEUE_LIMIT)

    def send(self, message: CoordinatorMessage) -> None:
        """Queue a message; never waits. An agent that does not read is cut off."""
        self._put(message)

    def close(self) -> None:
        """Close once all that is queued was sent."""
        self._put(None)

    def abort(self) -> None:
        """Cut the connection now."""
        if isinstance(self._transport, asyncio.WriteTransport):
            self._transport.abort()

    async def flushed(self) -> None:
        """Return when all that was queued is sent."""
        await self._queue.join()

    async def write(self) -> None:
        """Send what is queued until the connection is closed."""
        while True:
            message = await self._queue.get()
            try:
                if message is None:
                    await self._socket.close()
                    return
                await self._socket.send_str(message.to_json())
            except (ConnectionError, RuntimeError):
                self.abort()  # Broken, or closed by the peer: reading ends as well and tells.
                return
            finally:
                self._queue.task_done()

    def _put(self, message: CoordinatorMessage | None) -> None:
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self.abort()


class Channel:
    """One job's coordinator with its connections and its clock."""

    def __init__(self, coordinator: Coordinator, epoch: int, clock: Clock, closed: Callable[[], None]) -> None:
        self._coordinator = coordinator
        self._epoch = epoch
        self._clock = clock
        self._closed = closed
        self._connections: dict[ConnectionId, Connection] = {}
        self._ids = itertools.count(1)
        self._timer: asyncio.TimerHandle | None = None
        self._inputs: deque[tuple[Callable[[float], Output], bool]] = deque()
        self._busy = False
        self._open = True
        self._on_facts: Callable[[tuple[CoordinatorFact, ...]], None] = lambda facts: None
        self._on_change: Callable[[], None] = lambda: None

    @property
    def connections(self) -> int:
        """How many agents are connected."""
        return len(self._connections)

    def set_want(self, want: Want) -> None:
        """Tell the coordinator what the plan asks for."""
        self._put(lambda now: self._coordinator.set_want(want, now))

    def view(self) -> CoordinatorView:
        """The coordinator at this moment."""
        return self._coordinator.view()

    def on_facts(self, callback: Callable[[tuple[CoordinatorFact, ...]], None]) -> None:
        """Who takes the facts; reports are acknowledged after it returned."""
        self._on_facts = callback

    def on_change(self, callback: Callable[[], None]) -> None:
        """Who is told that the view may have changed, by more than a step."""
        self._on_change = callback

    async def end(self, reason: ShutdownReason, message: str) -> None:
        """Shut all agents down; returns when they were told or do not listen."""
        self._put(lambda now: self._coordinator.end(reason, message, now))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.gather(*(connection.flushed() for connection in self._connections.values()))

    def close(self) -> None:
        """Let go of all connections; agents go on and look for another coordinator."""
        self._open = False
        self._closed()
        if self._timer is not None:
            self._timer.cancel()
        for connection in self._connections.values():
            connection.close()

    async def serve(
        self, socket: web.WebSocketResponse, transport: asyncio.BaseTransport | None, caller: Caller
    ) -> None:
        """Speak with one agent until its connection ends; with none but the caller."""
        connection_id, connection = next(self._ids), Connection(socket, transport)
        self._connections[connection_id] = connection
        writer = asyncio.create_task(connection.write())
        try:
            await self._read(connection_id, connection, socket, caller)
        finally:
            del self._connections[connection_id]
            self._put(lambda now: self._coordinator.disconnected(connection_id, now))
            writer.cancel()

    async def _read(
        self, connection_id: ConnectionId, connection: Connection, socket: web.WebSocketResponse, caller: Caller
    ) -> None:
        greeted = False
        while True:
            message = await socket.receive(timeout=None if greeted else HELLO_SECONDS)
            if message.type is not WSMsgType.TEXT:
                return
            parsed = _parse(message.data)
            if isinstance(parsed, str):
                connection.send(Error(epoch=self._epoch, message=parsed))
            elif not greeted and isinstance(parsed, Hello):
                greeted = True
                if caller.may_say(parsed):
                    self._put(lambda now, hello=parsed: self._coordinator.connected(connection_id, hello, now))
                else:
                    connection.send(Error(epoch=self._epoch, message=_not_you(caller, parsed)))
                    connection.close()
            elif greeted:
                self._put(
                    lambda now, parsed=parsed: self._coordinator.received(connection_id, parsed, now),
                    routine=isinstance(parsed, Heartbeat) or (isinstance(parsed, Report) and is_step(parsed.body)),
                )
            else:
                connection.send(Error(epoch=self._epoch, message=f"say hello before {parsed.kind}"))

    def _put(self, feed: Callable[[float], Output], routine: bool = False) -> None:
        """Give an input to the coordinator. One that a callback gives comes after the one that it is called for."""
        self._inputs.append((feed, routine))
        if self._busy:
            return
        self._busy = True
        try:
            while self._inputs:
                feed, routine = self._inputs.popleft()
                self._carry_out(feed(self._clock()), routine)
        finally:
            self._busy = False
            self._schedule()

    def _carry_out(self, output: Output, routine: bool) -> None:
        if output.facts:
            self._on_facts(output.facts)
        for connection_id, message in output.sends:
            if (connection := self._connections.get(connection_id)) is not None:
                connection.send(message)
        for connection_id in output.closes:
            if (connection := self._connections.get(connection_id)) is not None:
                connection.close()
        if not routine or _calls_for_more(output):
            self._on_change()

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._coordinator.next_deadline()
        if self._open and deadline is not None:
            delay = max(0.0, deadline - self._clock())
            self._timer = asyncio.get_running_loop().call_later(
                delay, lambda: self._put(self._coordinator.tick, routine=True)
            )


class AgentServer:
    """Where agents connect: `/v1/jobs/{uid}/agents`. Holds the channels of all jobs of this operator."""

    def __init__(
        self, authenticate: Authenticate, clock: Clock | None = None, settings: Settings | None = None
    ) -> None:
        self._authenticate = authenticate
        self._clock = clock or steady_clock()
        self._settings = settings or Settings()
        self._channels: dict[str, Channel] = {}
        self._farewells: dict[str, Shutdown] = {}

    @property
    def connections(self) -> int:
        """Agents connected, of all jobs. Can be asked from any thread."""
        return sum(channel.connections for channel in tuple(self._channels.values()))

    def open(self, job_uid: str, *, epoch: int, highest_number: int) -> Channel:
        """Coordinate a job from now on. `highest_number`: the highest generation number in its status."""
        coordinator = Coordinator(job_uid, epoch, highest_number, self._settings)
        channel = Channel(coordinator, epoch, self._clock, closed=lambda: self._forget(job_uid, channel))
        self._channels[job_uid] = channel
        self._farewells.pop(job_uid, None)
        return channel

    def dismiss(self, job_uid: str, farewell: Shutdown) -> None:
        """The job is over and has no channel any more: agents that come all the same are told this."""
        self._farewells[job_uid] = farewell

    def forget(self, job_uid: str) -> None:
        """The job exists no more: agents that come are turned away."""
        self._farewells.pop(job_uid, None)

    def application(self) -> web.Application:
        """The web application with its two routes."""
        application = web.Application()
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/v1/jobs/{uid}/agents", self._agents)
        application.on_shutdown.append(self._shut_down)
        return application

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _agents(self, request: web.Request) -> web.StreamResponse:
        uid = request.match_info["uid"]
        caller = await self._authenticate(request, uid)
        if isinstance(caller, Refusal):
            return web.Response(status=caller.status, text=caller.message)
        channel = self._channels.get(uid) or self._channel_of_the_dismissed(uid)
        if channel is None:
            return web.Response(status=404, text=f"job {uid} is not coordinated here: retry, or look for its operator")
        socket = web.WebSocketResponse(timeout=CLOSE_SECONDS)
        await socket.prepare(request)
        with contextlib.suppress(TimeoutError):  # It never said hello.
            await channel.serve(socket, request.transport, caller)
        return socket

    async def _shut_down(self, application: web.Application) -> None:
        for channel in tuple(self._channels.values()):
            channel.close()

    def _channel_of_the_dismissed(self, job_uid: str) -> Channel | None:
        """For one connection of an agent of a job that is over."""
        farewell = self._farewells.get(job_uid)
        if farewell is None:
            return None
        coordinator = Coordinator(job_uid, farewell.epoch, 0, self._settings)
        coordinator.end(farewell.reason, farewell.message, self._clock())
        return Channel(coordinator, farewell.epoch, self._clock, closed=lambda: None)

    def _forget(self, job_uid: str, channel: Channel) -> None:
        if self._channels.get(job_uid) is channel:
            del self._channels[job_uid]


def _calls_for_more(output: Output) -> bool:
    """Whether more than steps was heard, or more than acknowledgements said."""
    return (
        bool(output.closes)
        or any(not isinstance(message, Acked) for _, message in output.sends)
        or any(not isinstance(fact, Reported) or not is_step(fact.body) for fact in output.facts)
    )


def _not_you(caller: Caller, hello: Hello) -> str:
    return (
        f"the token is that of slot {caller.slot}, attempt {caller.attempt}; hello said slot {hello.slot}, "
        f"attempt {hello.attempt}: start the agent with its own pod's values"
    )


def _parse(text: str) -> AgentMessage | str:
    """The message, or why it is none."""
    try:
        return AGENT_MESSAGE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"message not understood: {where + ': ' if where else ''}{first['msg']}"
