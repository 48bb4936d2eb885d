"""The WebSocket server around the coordinators: one channel per job, one connection per agent.

All channels share one event loop. Each connection has a bounded queue: an agent that does not read delays no other
agent and is disconnected when its queue is full.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable

import structlog
from aiohttp import WSMsgType, web

from pretrain_api.messages.protocol import (
    Acked,
    CoordinatorMessage,
    Error,
    Heartbeat,
    Hello,
    Report,
    Shutdown,
)
from pretrain_operator.coordinator.authentication import Authenticate, AuthenticationFailure, Caller
from pretrain_operator.coordinator.machine import Coordinator, ShutdownReason
from pretrain_operator.coordinator.members import ConnectionId
from pretrain_operator.coordinator.message_parser import Refusal, RefusalReason, parse_message
from pretrain_operator.coordinator.output import CoordinatorOutput
from pretrain_operator.coordinator.types import CoordinatorView, Want
from pretrain_operator.facts.fact import CoordinatorFact, Reported, is_step
from pretrain_operator.liveness.timings import TIMINGS, Timings

Clock = Callable[[], float]

QUEUE_LIMIT = 512
HELLO_SECONDS = 10.0
CLOSE_SECONDS = 1.0

log = structlog.get_logger()


def steady_clock() -> Clock:
    """Return a clock of unix seconds that never jumps: the current wall clock, advanced by the monotonic clock."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()


class AgentConnection:
    """The send queue of one agent's WebSocket."""

    def __init__(self, socket: web.WebSocketResponse, transport: asyncio.BaseTransport | None) -> None:
        self._socket = socket
        self._transport = transport
        self._queue: asyncio.Queue[CoordinatorMessage | None] = asyncio.Queue(QUEUE_LIMIT)

    def send(self, message: CoordinatorMessage) -> None:
        """Queue a message without waiting; a full queue aborts the connection."""
        self._put(message)

    def close(self) -> None:
        """Close once the queue is sent."""
        self._put(None)

    def abort(self) -> None:
        """Abort the connection at once."""
        if isinstance(self._transport, asyncio.WriteTransport):
            self._transport.abort()

    async def flushed(self) -> None:
        """Wait until the queue is sent."""
        await self._queue.join()

    async def write(self) -> None:
        """Send queued messages until the connection closes."""
        while True:
            message = await self._queue.get()
            try:
                if message is None:
                    await self._socket.close()
                    return
                await self._socket.send_str(message.to_json())
            except (ConnectionError, RuntimeError):
                self.abort()  # broken, or closed by the peer: the reader ends as well and reports it
                return
            finally:
                self._queue.task_done()

    def _put(self, message: CoordinatorMessage | None) -> None:
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self.abort()


class CoordinatorChannel:
    """One job's coordinator with its connections and its clock."""

    def __init__(
        self, coordinator: Coordinator, epoch: int, clock: Clock,
        closed: Callable[[], None], refused: Callable[[Refusal], None],
    ) -> None:  # fmt: skip
        self._coordinator = coordinator
        self._epoch = epoch
        self._clock = clock
        self._closed = closed
        self._refused = refused
        self._connections: dict[ConnectionId, AgentConnection] = {}
        self._ids = itertools.count(1)
        self._timer: asyncio.TimerHandle | None = None
        self._inputs: deque[tuple[Callable[[float], CoordinatorOutput], bool]] = deque()
        self._busy = False
        self._open = True
        self._on_facts: Callable[[tuple[CoordinatorFact, ...]], None] = lambda facts: None
        self._on_change: Callable[[], None] = lambda: None

    @property
    def connections(self) -> int:
        """Number of connected agents."""
        return len(self._connections)

    def set_want(self, want: Want) -> None:
        """Set what the plan wants from the coordinator."""
        self._put(lambda now: self._coordinator.set_want(want, now))

    def view(self) -> CoordinatorView:
        """Return the coordinator's current state."""
        return self._coordinator.view()

    def on_facts(self, callback: Callable[[tuple[CoordinatorFact, ...]], None]) -> None:
        """Set the consumer of facts; reports are acknowledged after it returns."""
        self._on_facts = callback

    def on_change(self, callback: Callable[[], None]) -> None:
        """Set the callback for changes of the view other than completed steps."""
        self._on_change = callback

    async def end(self, reason: ShutdownReason, message: str) -> None:
        """Shut down all agents; returns once the messages are sent or a timeout expires."""
        self._put(lambda now: self._coordinator.end(reason, message, now))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.gather(*(connection.flushed() for connection in self._connections.values()))

    def close(self) -> None:
        """Close all connections; agents continue and look for another coordinator."""
        self._open = False
        self._closed()
        if self._timer is not None:
            self._timer.cancel()
        for connection in self._connections.values():
            connection.close()

    async def serve(
        self, socket: web.WebSocketResponse, transport: asyncio.BaseTransport | None, caller: Caller
    ) -> None:
        """Serve one agent, which must be the caller, until its connection ends."""
        connection_id, connection = next(self._ids), AgentConnection(socket, transport)
        self._connections[connection_id] = connection
        writer = asyncio.create_task(connection.write())
        try:
            await self._read(connection_id, connection, socket, caller)
        finally:
            del self._connections[connection_id]
            self._put(lambda now: self._coordinator.disconnected(connection_id, now))
            writer.cancel()

    async def _read(
        self, connection_id: ConnectionId, connection: AgentConnection, socket: web.WebSocketResponse, caller: Caller
    ) -> None:
        greeted = False
        while True:
            message = await socket.receive(timeout=None if greeted else HELLO_SECONDS)
            if message.type is not WSMsgType.TEXT:
                return
            parsed = parse_message(message.data)
            if isinstance(parsed, Refusal):
                connection.send(Error(epoch=self._epoch, message=parsed.message))
                if parsed.is_failure:
                    self._put(
                        lambda now, parsed=parsed: self._coordinator.refuse(connection_id, caller.pod, parsed, now)
                    )
                    connection.close()
                else:
                    self._refused(parsed)
            elif not greeted and isinstance(parsed, Hello):
                greeted = True
                if caller.may_say(parsed):
                    self._put(lambda now, hello=parsed: self._coordinator.connected(connection_id, hello, now))
                else:
                    connection.send(Error(epoch=self._epoch, message=_wrong_worker(caller, parsed)))
                    connection.close()
            elif greeted:
                self._put(
                    lambda now, parsed=parsed: self._coordinator.received(connection_id, parsed, now),
                    routine=isinstance(parsed, Heartbeat) or (isinstance(parsed, Report) and is_step(parsed.body)),
                )
            else:
                connection.send(Error(epoch=self._epoch, message=f"send hello before {parsed.kind}"))

    def _put(self, feed: Callable[[float], CoordinatorOutput], routine: bool = False) -> None:
        """Process an input. Inputs from callbacks are queued behind the current one."""
        self._inputs.append((feed, routine))
        if self._busy:
            return
        self._busy = True
        try:
            while self._inputs:
                feed, routine = self._inputs.popleft()
                self._apply(feed(self._clock()), routine)
        finally:
            self._busy = False
            self._schedule()

    def _apply(self, output: CoordinatorOutput, routine: bool) -> None:
        for refusal in output.refusals:
            self._refused(refusal)
        if output.facts:
            self._on_facts(output.facts)
        for connection_id, message in output.sends:
            if (connection := self._connections.get(connection_id)) is not None:
                connection.send(message)
        for connection_id in output.closes:
            if (connection := self._connections.get(connection_id)) is not None:
                connection.close()
        if not routine or _needs_reconcile(output):
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
    """The agents' endpoint `/v1/jobs/{uid}/agents`, with the channels of all jobs of this operator."""

    def __init__(
        self,
        authenticate: Authenticate,
        clock: Clock | None = None,
        timings: Timings = TIMINGS,
        refused: Callable[[RefusalReason], None] = lambda reason: None,
    ) -> None:
        """`refused` counts refused messages."""
        self._authenticate = authenticate
        self._refused = refused
        self._clock = clock or steady_clock()
        self._timings = timings
        self._channels: dict[str, CoordinatorChannel] = {}
        self._shutdowns: dict[str, Shutdown] = {}

    @property
    def connections(self) -> int:
        """Number of connected agents of all jobs. Thread-safe."""
        return sum(channel.connections for channel in tuple(self._channels.values()))

    def open(self, job_uid: str, *, epoch: int, highest_number: int) -> CoordinatorChannel:
        """Start to coordinate a job. `highest_number`: highest generation number in its status."""
        coordinator = Coordinator(job_uid, epoch, highest_number, self._timings)
        channel = CoordinatorChannel(
            coordinator, epoch, self._clock,
            closed=lambda: self._forget(job_uid, channel), refused=lambda refusal: self._count(job_uid, refusal),
        )  # fmt: skip
        self._channels[job_uid] = channel
        self._shutdowns.pop(job_uid, None)
        return channel

    def dismiss(self, job_uid: str, shutdown: Shutdown) -> None:
        """Send this shutdown to agents that connect after the job's channel is closed."""
        self._shutdowns[job_uid] = shutdown

    def forget(self, job_uid: str) -> None:
        """Forget a deleted job: its agents get 404."""
        self._shutdowns.pop(job_uid, None)

    def application(self) -> web.Application:
        """Return the web application with its two routes."""
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
        if isinstance(caller, AuthenticationFailure):
            return web.Response(status=caller.status, text=caller.message)
        channel = self._channels.get(uid) or self._shutdown_channel(uid)
        if channel is None:
            return web.Response(status=404, text=f"job {uid} is not coordinated here: retry, or find its operator")
        socket = web.WebSocketResponse(timeout=CLOSE_SECONDS)
        await socket.prepare(request)
        with contextlib.suppress(TimeoutError):  # no hello arrived in time
            await channel.serve(socket, request.transport, caller)
        return socket

    async def _shut_down(self, application: web.Application) -> None:
        for channel in tuple(self._channels.values()):
            channel.close()

    def _shutdown_channel(self, job_uid: str) -> CoordinatorChannel | None:
        """Return a channel that shuts down one late agent of a job that is over."""
        shutdown = self._shutdowns.get(job_uid)
        if shutdown is None:
            return None
        coordinator = Coordinator(job_uid, shutdown.epoch, 0, self._timings)
        coordinator.end(shutdown.reason, shutdown.message, self._clock())
        return CoordinatorChannel(coordinator, shutdown.epoch, self._clock, lambda: None, lambda refusal: None)

    def _count(self, job_uid: str, refusal: Refusal) -> None:
        self._refused(refusal.reason)
        if refusal.is_failure:
            log.warning("worker treated as failed", job_uid=job_uid, pod=refusal.pod, error=refusal.message)

    def _forget(self, job_uid: str, channel: CoordinatorChannel) -> None:
        if self._channels.get(job_uid) is channel:
            del self._channels[job_uid]


def _needs_reconcile(output: CoordinatorOutput) -> bool:
    """Return whether the output contains more than step reports and acknowledgements."""
    return (
        bool(output.closes)
        or any(not isinstance(message, Acked) for _, message in output.sends)
        or any(not isinstance(fact, Reported) or not is_step(fact.body) for fact in output.facts)
    )


def _wrong_worker(caller: Caller, hello: Hello) -> str:
    return (
        f"the token belongs to slot {caller.slot}, attempt {caller.attempt}; hello states slot {hello.slot}, "
        f"attempt {hello.attempt}: start the agent with its own pod's values"
    )
