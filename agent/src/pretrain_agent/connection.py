"""The agent's one WebSocket to the coordinator: comes back by itself, and replays what was not acknowledged."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import aiohttp
import structlog
from pydantic import ValidationError

from pretrain_agent.outbox import Outbox
from pretrain_api.protocol import (
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
CONNECT_SECONDS = 5.0
PING_SECONDS = 10.0
"""A coordinator that answers no ping for half of this is as good as gone: connect anew."""

log = structlog.get_logger()


class Connection:
    """Says hello on every connection, then sends reports in order, other messages, and heartbeats when idle.

    `hello` and `heartbeat` tell the agent's state at the moment; `receive` takes the coordinator's messages.
    `random` gives numbers in [0, 1), so that not all agents come back at the same moment.
    """

    def __init__(
        self,
        url: str,
        token_file: Path | None,
        outbox: Outbox,
        hello: Callable[[], Hello],
        heartbeat: Callable[[], Heartbeat],
        receive: Callable[[CoordinatorMessage], Awaitable[None]],
        random: Callable[[], float],
    ) -> None:
        self._url = url
        self._token_file = token_file
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

    def report_added(self) -> None:
        """The outbox has something new."""
        self._wake()

    async def flush(self, timeout: float) -> None:
        """Wait until everything is sent, for at most `timeout` seconds."""
        if self.joined.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout)

    async def run(self) -> None:
        """Stay connected for ever."""
        wait = FIRST_WAIT
        told = False
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(connect=CONNECT_SECONDS)) as session:
            while True:
                try:
                    async with session.ws_connect(
                        self._url, headers=self._headers(), heartbeat=PING_SECONDS, max_msg_size=0
                    ) as socket:
                        await self._converse(socket)
                except (aiohttp.ClientError, OSError, TimeoutError) as error:
                    if not told:
                        log.warning("no coordinator: training goes on, trying again", error=str(error), url=self._url)
                        told = True
                if self.joined.is_set():
                    log.info("connection to the coordinator ended")
                    wait, told = FIRST_WAIT, False
                self.joined.clear()
                self._messages.clear()
                await asyncio.sleep(wait * (0.5 + self._random()))
                wait = min(2 * wait, LONGEST_WAIT)

    def _headers(self) -> dict[str, str]:
        if self._token_file is None:
            return {}
        return {"Authorization": f"Bearer {self._token_file.read_text().strip()}"}

    async def _converse(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        await socket.send_str(self._hello().to_json())
        sender: asyncio.Task[None] | None = None
        try:
            async for frame in socket:
                if frame.type is not aiohttp.WSMsgType.TEXT or (message := _parse(frame.data)) is None:
                    continue
                if message.epoch < self._highest_epoch:
                    log.warning("an older coordinator spoke", epoch=message.epoch, highest=self._highest_epoch)
                    if isinstance(message, Joined):
                        return  # Look for the newer one.
                    continue
                self._highest_epoch = message.epoch
                if isinstance(message, Joined) and sender is None:
                    sender = self._join(socket, message)
                elif isinstance(message, Acked):
                    self._outbox.acknowledge(message.seq)
                await self._receive(message)
        finally:
            if sender is not None:
                sender.cancel()
                with suppress(asyncio.CancelledError, aiohttp.ClientError, OSError):
                    await sender

    def _join(self, socket: aiohttp.ClientWebSocketResponse, joined: Joined) -> asyncio.Task[None]:
        self._outbox.acknowledge(joined.acked_seq)
        self._sent_seq = joined.acked_seq
        self.joined.set()
        self._wake()
        return asyncio.create_task(self._send_all(socket))

    async def _send_all(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            self._work.clear()
            for report in self._outbox.after(self._sent_seq):
                await socket.send_str(report.to_json())
                self._sent_seq = report.seq
            while self._messages:
                await socket.send_str(self._messages.popleft().to_json())
            if self._work.is_set():
                continue
            self._idle.set()
            try:
                await asyncio.wait_for(self._work.wait(), HEARTBEAT_SECONDS)
            except TimeoutError:
                await socket.send_str(self._heartbeat().to_json())

    def _wake(self) -> None:
        self._idle.clear()
        self._work.set()


def _parse(text: str) -> CoordinatorMessage | None:
    try:
        return COORDINATOR_MESSAGE.validate_json(text)
    except ValidationError as error:
        log.warning("the coordinator sent what this agent does not know", error=str(error))
        return None
