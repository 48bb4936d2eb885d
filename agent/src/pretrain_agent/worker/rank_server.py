"""Unix socket through which the local ranks of one generation talk to their agent."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import structlog
from pydantic import ValidationError

from pretrain_api.messages.protocol import Command, Generation
from pretrain_api.messages.reports import REPORT_BODY, ReportBody, Started
from pretrain_sdk.rank_link import socket_address

MAX_LINE_BYTES = 16 * 2**20

log = structlog.get_logger()


class RankServer:
    """Receives reports of one generation's ranks and forwards commands to them.

    Each generation has its own socket, so every connected rank belongs to it.
    """

    def __init__(
        self,
        generation: Generation,
        on_report: Callable[[Started, ReportBody], None],
        on_dropped: Callable[[int], None],
    ) -> None:
        self.generation = generation
        self.on_report = on_report
        self.on_dropped = on_dropped
        self.last_words: dict[int, str] = {}
        """Tracebacks of ranks that raised an exception, by local rank."""
        self._server: asyncio.Server | None = None
        self._ranks: dict[int, RankConnection] = {}
        self._ends: dict[int, asyncio.Event] = {}
        self._commands: list[Command] = []

    async def open(self, path: str) -> None:
        """Listen. Must be called before ranks start."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: RankConnection(self), socket_address(path))

    def command(self, command: Command) -> None:
        """Forward a command to all local ranks, including those that connect later."""
        self._commands.append(command)
        for rank in self._ranks.values():
            rank.send(command.to_json())

    @property
    def connected(self) -> bool:
        """True while a rank is connected."""
        return bool(self._ranks)

    async def drain(self, local_rank: int, timeout: float) -> None:
        """Wait until everything that a dead rank sent is read.

        The timeout is needed because its children may keep the socket open.
        """
        if (end := self._ends.get(local_rank)) is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(end.wait(), timeout)

    def close(self) -> None:
        """Disconnect all ranks and stop listening."""
        if self._server is not None:
            self._server.close()
        for rank in self._ranks.values():
            rank.close()

    def joined(self, rank: RankConnection, started: Started) -> None:
        """Register a rank that sent Started, and answer with the generation."""
        self._ranks[started.local_rank] = rank
        self._ends[started.local_rank] = asyncio.Event()
        rank.send(self.generation.to_json())
        for command in self._commands:
            rank.send(command.to_json())
        self.on_report(started, started)

    def left(self, rank: RankConnection, started: Started) -> None:
        """Unregister a rank whose connection ended; everything it sent is handled."""
        if self._ranks.get(started.local_rank) is rank:
            del self._ranks[started.local_rank]
            self._ends[started.local_rank].set()


class RankConnection(asyncio.Protocol):
    """Connection of one rank.

    A protocol, not a stream: a rank that exits with an unread command resets its connection, and a stream reader then
    discards its buffer, which may hold the rank's last report.
    """

    def __init__(self, server: RankServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._started: Started | None = None
        self._received = b""

    def send(self, line: str) -> None:
        """Send a line soon."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(line.encode() + b"\n")

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Refuse connections of other users: socket names are not secret."""
        self._transport = cast(asyncio.Transport, transport)
        peer = cast(socket.socket, transport.get_extra_info("socket"))
        _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        if uid != os.getuid():
            self.close()

    def data_received(self, data: bytes) -> None:
        """Handle every complete line."""
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > MAX_LINE_BYTES:
            log.warning("line of a rank is too long", bytes=len(self._received))
            self.close()
        for line in lines:
            try:
                self._take(line)
            except (ValidationError, ValueError, KeyError) as error:
                log.warning("invalid report of a rank", error=str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        """Unregister the rank."""
        if self._started is not None:
            self._server.left(self, self._started)

    def _take(self, line: bytes) -> None:
        if (note := _note(line)) is not None:
            self._take_note(note)
        elif self._started is None:
            self._started = Started.from_json(line)
            self._server.joined(self, self._started)
        else:
            self._server.on_report(self._started, REPORT_BODY.validate_json(line))

    def _take_note(self, note: dict[str, Any]) -> None:
        if note["kind"] == "dropped":
            self._server.on_dropped(int(note["count"]))
        else:
            self._server.last_words[int(note["localRank"])] = str(note["text"])
            self.close()  # The rank waits for this before it exits.


def _note(line: bytes) -> dict[str, Any] | None:
    """Parse a line addressed to the agent only; None: it is a report."""
    if b'"dropped"' not in line[:30] and b'"last_words"' not in line[:30]:
        return None  # Almost all lines are reports: do not parse them twice.
    note: Any = json.loads(line)
    if not isinstance(note, dict) or cast(dict[str, Any], note).get("kind") not in ("dropped", "last_words"):
        return None
    return cast(dict[str, Any], note)
