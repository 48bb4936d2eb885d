"""The agent's one WebSocket to the coordinator: comes back by itself, and replays what was not acknowledged."""

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
from pretrain_agent.worker.outbox import Outbox
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

FIRST_WAIT = 0.05
LONGEST_WAIT = 1.0
"""Between two connections: what a coordinator counts on that has just taken over."""
CONNECT_SECONDS = 5.0
"""For the whole of it, from the look-up of the name to the coordinator's consent."""
TRY_SECONDS = 1.0
"""A try that nobody answers is joined by another one after so long, up to `TRIES`. A Service may lead to a replica that
answers no more until somewhat later it leads to another one; a try stays with the one that it was sent to."""
TRIES = 4
PING_SECONDS = 0.5
"""Of which nothing is heard for so long is asked; who does not even answer UNANSWERED times is as good as gone: connect
anew. Soon, for all workers of a job must have noticed by the time that another coordinator takes over."""
UNANSWERED = 5
CLOSE_SECONDS = 0.2
"""Nobody may be there to say goodbye."""
UNHEARD_SECONDS = 3.0
"""A machine that confirms nothing for so long is gone, or cut off: found out sooner than by the ping, since something
is sent every HEARTBEAT_SECONDS, and the kernel there confirms it even when the coordinator is busy."""

log = structlog.get_logger()


class Connection:
    """Says hello on every connection, then sends reports in order, other messages, and heartbeats when idle.

    For `wss://` the coordinator's certificate must be signed by one in `ca_file`, or by one that the system trusts if
    there is none. Both files are read for every connection, since they change while the agent runs.
    `hello` and `heartbeat` tell the agent's state at the moment; `receive` takes the coordinator's messages.
    `random` gives numbers in [0, 1), so that not all agents come back at the same moment.
    """

    def __init__(
        self,
        url: str,
        token_file: Path | None,
        ca_file: Path | None,
        outbox: Outbox,
        hello: Callable[[], Hello],
        heartbeat: Callable[[], Heartbeat],
        receive: Callable[[CoordinatorMessage], Awaitable[None]],
        random: Callable[[], float],
    ) -> None:
        self._url = url
        self._token_file = token_file
        self._ca_file = ca_file
        self._outbox = outbox
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
        """Set while the coordinator knows this agent on the present connection."""

    @property
    def highest_epoch(self) -> int:
        """The highest epoch that any message of a coordinator carried."""
        return self._highest_epoch

    def send(self, message: AgentMessage) -> None:
        """Send soon, after the reports made before it; lost without a connection, since the next hello tells all."""
        if self.joined.is_set():
            self._messages.append(message)
            self._wake()

    def report_added(self, *, urgent: bool) -> None:
        """The outbox has something new. What is not urgent goes out in place of the next heartbeat."""
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
        """Stay connected for ever."""
        wait = FIRST_WAIT
        told: set[str] = set()
        connector = aiohttp.TCPConnector(resolver=ServiceResolver(aiohttp.DefaultResolver()), use_dns_cache=False)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(), connector=connector) as session:
            while True:
                try:
                    async with await self._connect(session) as connected:
                        await self._converse(connected)
                except (aiohttp.ClientError, OSError) as error:  # TimeoutError is one
                    _tell_once(told, str(error) or type(error).__name__, self._url)
                if self.joined.is_set():
                    log.info("connection to the coordinator ended")
                    wait = FIRST_WAIT
                    told.clear()
                self.joined.clear()
                self._messages.clear()
                await asyncio.sleep(wait * (0.5 + self._random() / 2))
                wait = min(2 * wait, LONGEST_WAIT)

    async def _connect(self, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
        async with asyncio.timeout(CONNECT_SECONDS):
            connected = await _first_to_answer(lambda: self._try(session))
        _give_up_when_unheard(connected)
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
        listening = Listening()
        guard = asyncio.create_task(listening.hang_up_when_silent(connected))
        try:
            async for frame in connected:
                listening.heard = True
                if frame.type is aiohttp.WSMsgType.PING:
                    await connected.pong(frame.data)
                if frame.type is not aiohttp.WSMsgType.TEXT or (message := _parse(frame.data)) is None:
                    continue
                if message.epoch < self._highest_epoch:
                    log.warning("an older coordinator spoke", epoch=message.epoch, highest=self._highest_epoch)
                    if isinstance(message, Joined):
                        return  # Look for the newer one.
                    continue
                self._highest_epoch = message.epoch
                if isinstance(message, Joined) and sender is None:
                    sender = self._join(connected, message)
                elif isinstance(message, Acked):
                    self._outbox.acknowledge(message.seq)
                await self._receive(message)
        finally:
            for task in (guard, sender):
                if task is not None:
                    task.cancel()
                    with suppress(asyncio.CancelledError, aiohttp.ClientError, OSError):
                        await task

    def _join(self, connected: aiohttp.ClientWebSocketResponse, joined: Joined) -> asyncio.Task[None]:
        self._outbox.acknowledge(joined.acked_seq)
        self._sent_seq = joined.acked_seq
        self.joined.set()
        self._wake()
        return asyncio.create_task(self._send_all(connected))

    async def _send_all(self, connected: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            self._work.clear()
            for report in self._outbox.after(self._sent_seq):
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
                if next(self._outbox.after(self._sent_seq), None) is None:
                    await connected.send_str(self._heartbeat().to_json())

    def _wake(self) -> None:
        self._idle.clear()
        self._work.set()


class Listening:
    """Whether the coordinator was heard of late. Counted in looks, not in seconds: of a process that is late itself
    nobody knows how long the other one was silent."""

    def __init__(self) -> None:
        self.heard = False

    async def hang_up_when_silent(self, connected: aiohttp.ClientWebSocketResponse) -> None:
        """Ask a coordinator that says nothing; close the connection to one that does not answer either."""
        silent = 0
        while silent < UNANSWERED:
            await asyncio.sleep(PING_SECONDS)
            silent = 0 if self.heard else silent + 1
            self.heard = False
            if silent:
                await connected.ping()
        log.warning("the coordinator answers no more")
        await connected.close()


async def _first_to_answer(
    connect: Callable[[], Coroutine[None, None, aiohttp.ClientWebSocketResponse]],
) -> aiohttp.ClientWebSocketResponse:
    """What the first of several tries to connect comes to, be it an error; those that are still under way end."""
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


def _tell_once(told: set[str], error: str, url: str) -> None:
    if error not in told:
        told.add(error)
        log.warning("no coordinator: training goes on, trying again", error=error, url=url)


def _give_up_when_unheard(connected: aiohttp.ClientWebSocketResponse) -> None:
    """Have the kernel break the connection when what was sent is not confirmed for too long."""
    plain: socket.socket | None = connected.get_extra_info("socket")
    if plain is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(UNHEARD_SECONDS * 1000))


def _parse(text: str) -> CoordinatorMessage | None:
    try:
        return COORDINATOR_MESSAGE.validate_json(text)
    except ValidationError as error:
        log.warning("the coordinator sent what this agent does not know", error=str(error))
        return None
