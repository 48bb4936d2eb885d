"""WebSocket of the agent to the coordinator: reconnects by itself and replays unacknowledged reports."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from pathlib import Path

import aiohttp
import structlog
from pydantic import ValidationError

from pretrain_agent.network.addresses import ServiceResolver
from pretrain_agent.worker.report_buffer import ReportBuffer
from pretrain_api.backoff import Backoff
from pretrain_api.messages.protocol import (
    COORDINATOR_MESSAGE,
    HEARTBEAT_SECONDS,
    Acked,
    AgentMessage,
    CoordinatorMessage,
    Heartbeat,
    Hello,
    Joined,
)

RECONNECT = Backoff(first=0.05, factor=2, most=1.0, jitter=1)
"""Delays between two connections. A coordinator that has just taken over relies on the longest one."""
CONNECT_SECONDS = 5.0
"""Timeout of a connection, from the name look-up to the WebSocket upgrade."""
TRY_SECONDS = 1.0
"""Delay after which an unanswered connection attempt is joined by another one, up to `TRIES`. A Service may still
route to a replica that is gone, and an attempt stays with the replica that it was routed to."""
TRIES = 4
PING_SECONDS = 0.5
"""Ping after this much silence. After UNANSWERED pings the connection counts as lost: all workers of a job must notice
before another coordinator takes over."""
UNANSWERED = 5
CLOSE_SECONDS = 0.2
"""Timeout of the closing handshake: the peer may be gone."""
UNHEARD_SECONDS = 3.0
"""TCP user timeout: a machine whose kernel acknowledges nothing for this time is gone or cut off. Detects it sooner
than the ping, since something is sent every HEARTBEAT_SECONDS and a busy coordinator's kernel still acknowledges."""

log = structlog.get_logger()


class CoordinatorConnection:
    """Sends Hello on every connection, then reports in order, other messages, and heartbeats when idle.

    For `wss://` the coordinator's certificate must be signed by a CA in `ca_file`, or without one by a CA that the
    system trusts. Both files are read again for every connection, since they are rotated while the agent runs.
    `hello` and `heartbeat` return the agent's current state; `receive` handles the coordinator's messages.
    `random` draws from [0, 1), so that agents do not reconnect at the same moment.
    """

    def __init__(
        self,
        url: str,
        token_file: Path | None,
        ca_file: Path | None,
        reports: ReportBuffer,
        hello: Callable[[], Hello],
        heartbeat: Callable[[], Heartbeat],
        receive: Callable[[CoordinatorMessage], Awaitable[None]],
        random: Callable[[], float],
    ) -> None:
        self._url = url
        self._token_file = token_file
        self._ca_file = ca_file
        self._reports = reports
        self._hello = hello
        self._heartbeat = heartbeat
        self._receive = receive
        self._random = random
        self._highest_epoch = 0
        self._messages: deque[AgentMessage] = deque()
        self._sent_seq = 0
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self.joined = asyncio.Event()
        """Set while the coordinator has accepted this agent on the current connection."""

    @property
    def highest_epoch(self) -> int:
        """Highest epoch of all messages received."""
        return self._highest_epoch

    def send(self, message: AgentMessage) -> None:
        """Send soon, after the earlier reports. Dropped without a connection: the next Hello carries all state."""
        if self.joined.is_set():
            self._messages.append(message)
            self._wake()

    def report_added(self, *, urgent: bool) -> None:
        """Send new reports of the buffer: urgent ones at once, others in place of the next heartbeat."""
        if urgent:
            self._wake()
        else:
            self._idle.clear()

    async def flush(self, timeout: float) -> None:
        """Wait until everything is sent, for at most `timeout` seconds."""
        if self.joined.is_set():
            self._wake()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout)

    async def run(self) -> None:
        """Stay connected until cancelled."""
        attempt = 1
        logged: set[str] = set()
        connector = aiohttp.TCPConnector(resolver=ServiceResolver(aiohttp.DefaultResolver()), use_dns_cache=False)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(), connector=connector) as session:
            while True:
                try:
                    async with await self._connect(session) as connected:
                        await self._converse(connected)
                except (aiohttp.ClientError, OSError) as error:  # TimeoutError is one
                    _log_once(logged, str(error) or type(error).__name__, self._url)
                if self.joined.is_set():
                    log.info("connection to the coordinator ended")
                    attempt = 1
                    logged.clear()
                self.joined.clear()
                self._messages.clear()
                await asyncio.sleep(RECONNECT.delay(attempt, self._random))
                attempt += 1

    async def _connect(self, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
        async with asyncio.timeout(CONNECT_SECONDS):
            connected = await _first_to_answer(lambda: self._try(session))
        _set_user_timeout(connected)
        return connected

    async def _try(self, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
        return await session.ws_connect(
            self._url, headers=self._headers(), ssl=self._trusted(), autoping=False, max_msg_size=0,
            timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_SECONDS),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip

    def _headers(self) -> dict[str, str]:
        if self._token_file is None:
            return {}
        return {"Authorization": f"Bearer {self._token_file.read_bytes().strip().decode(errors='replace')}"}

    def _trusted(self) -> ssl.SSLContext | bool:
        if self._ca_file is None:
            return True
        try:
            return ssl.create_default_context(cafile=self._ca_file)
        except OSError as error:
            raise OSError(f"--ca-file {self._ca_file}: {error}") from error

    async def _converse(self, connected: aiohttp.ClientWebSocketResponse) -> None:
        await connected.send_str(self._hello().to_json())
        sender: asyncio.Task[None] | None = None
        silence = SilenceWatch()
        guard = asyncio.create_task(silence.close_when_silent(connected))
        try:
            async for frame in connected:
                silence.heard = True
                if frame.type is aiohttp.WSMsgType.PING:
                    await connected.pong(frame.data)
                if frame.type is not aiohttp.WSMsgType.TEXT or (message := _parse(frame.data)) is None:
                    continue
                if message.epoch < self._highest_epoch:
                    log.warning(
                        "message of an earlier coordinator ignored", epoch=message.epoch, highest=self._highest_epoch
                    )
                    if isinstance(message, Joined):
                        return  # Reconnect to the newer one.
                    continue
                self._highest_epoch = message.epoch
                if isinstance(message, Joined) and sender is None:
                    sender = self._join(connected, message)
                elif isinstance(message, Acked):
                    self._reports.acknowledge(message.seq)
                await self._receive(message)
        finally:
            for task in (guard, sender):
                if task is not None:
                    task.cancel()
                    with suppress(asyncio.CancelledError, aiohttp.ClientError, OSError):
                        await task

    def _join(self, connected: aiohttp.ClientWebSocketResponse, joined: Joined) -> asyncio.Task[None]:
        self._reports.acknowledge(joined.acked_seq)
        self._sent_seq = joined.acked_seq
        self.joined.set()
        self._wake()
        return asyncio.create_task(self._send_all(connected))

    async def _send_all(self, connected: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            self._work.clear()
            for report in self._reports.after(self._sent_seq):
                await connected.send_str(report.to_json())
                self._sent_seq = report.seq
            while self._messages:
                await connected.send_str(self._messages.popleft().to_json())
            if self._work.is_set():
                continue
            self._idle.set()
            try:
                await asyncio.wait_for(self._work.wait(), HEARTBEAT_SECONDS)
            except TimeoutError:
                if next(self._reports.after(self._sent_seq), None) is None:
                    await connected.send_str(self._heartbeat().to_json())

    def _wake(self) -> None:
        self._idle.clear()
        self._work.set()


class SilenceWatch:
    """Pings a silent coordinator. Counts checks, not seconds: a delayed process cannot measure the peer's silence."""

    def __init__(self) -> None:
        self.heard = False

    async def close_when_silent(self, connected: aiohttp.ClientWebSocketResponse) -> None:
        """Ping the coordinator while it is silent; close the connection after UNANSWERED pings."""
        silent = 0
        while silent < UNANSWERED:
            await asyncio.sleep(PING_SECONDS)
            silent = 0 if self.heard else silent + 1
            self.heard = False
            if silent:
                await connected.ping()
        log.warning("coordinator does not answer pings")
        await connected.close()


async def _first_to_answer(
    connect: Callable[[], Coroutine[None, None, aiohttp.ClientWebSocketResponse]],
) -> aiohttp.ClientWebSocketResponse:
    """Return the result, or raise the error, of the first attempt that finishes; cancel the others."""
    tries: list[asyncio.Task[aiohttp.ClientWebSocketResponse]] = []
    try:
        while True:
            if len(tries) < TRIES:
                tries.append(asyncio.create_task(connect()))
            done, _ = await asyncio.wait(tries, timeout=TRY_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if done:
                first = next(task for task in tries if task in done)
                tries.remove(first)
                return first.result()
    finally:
        for task in tries:
            task.cancel()
        for late in await asyncio.gather(*tries, return_exceptions=True):
            if isinstance(late, aiohttp.ClientWebSocketResponse):
                await late.close()


def _log_once(logged: set[str], error: str, url: str) -> None:
    if error not in logged:
        logged.add(error)
        log.warning("coordinator unreachable: training continues, retrying", error=error, url=url)


def _set_user_timeout(connected: aiohttp.ClientWebSocketResponse) -> None:
    """Have the kernel reset the connection when sent data stays unacknowledged."""
    plain: socket.socket | None = connected.get_extra_info("socket")
    if plain is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(UNHEARD_SECONDS * 1000))


def _parse(text: str) -> CoordinatorMessage | None:
    try:
        return COORDINATOR_MESSAGE.validate_json(text)
    except ValidationError as error:
        log.warning("unknown message from the coordinator", error=str(error))
        return None
