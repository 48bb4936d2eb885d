"""The Unix socket at which the local ranks of one generation reach their agent."""

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
    """Takes reports of the ranks of one generation and passes commands to them.

    Each generation has a socket of its own: whoever is connected here belongs to it.
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
        """Tracebacks of ranks that ended by an exception, by local rank."""
        self._server: asyncio.Server | None = None
        self._ranks: dict[int, RankConnection] = {}
        self._ends: dict[int, asyncio.Event] = {}
        self._commands: list[Command] = []

    async def open(self, path: str) -> None:
        """Listen; must be done before ranks start."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: RankConnection(self), socket_address(path))

    def command(self, command: Command) -> None:
        """Pass a command to all local ranks, those that connect later included."""
        self._commands.append(command)
        for rank in self._ranks.values():
            rank.send(command.to_json())

    @property
    def connected(self) -> bool:
        """Some rank listens to commands."""
        return bool(self._ranks)

    async def drain(self, local_rank: int, timeout: float) -> None:
        """Wait until all that a dead rank said has been read.

        With a timeout, since children that it left behind may hold its socket open.
        """
        if (end := self._ends.get(local_rank)) is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(end.wait(), timeout)

    def close(self) -> None:
        """Hang up on all ranks and stop listening."""
        if self._server is not None:
            self._server.close()
        for rank in self._ranks.values():
            rank.close()

    def joined(self, rank: RankConnection, started: Started) -> None:
        """A rank said who it is."""
        self._ranks[started.local_rank] = rank
        self._ends[started.local_rank] = asyncio.Event()
        rank.send(self.generation.to_json())
        for command in self._commands:
            rank.send(command.to_json())
        self.on_report(started, started)

    def left(self, rank: RankConnection, started: Started) -> None:
        """A rank's connection ended, and all that it said was taken."""
        if self._ranks.get(started.local_rank) is rank:
            del self._ranks[started.local_rank]
            self._ends[started.local_rank].set()


class RankConnection(asyncio.Protocol):
    """One connection. A protocol, not a stream: a rank that leaves a command unread resets its connection as it goes,
    and a stream reader forgets what it has buffered then, which may be the rank's last report."""

    def __init__(self, server: RankServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._started: Started | None = None
        self._received = b""

    def send(self, line: str) -> None:
        """Send a line, soon."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(line.encode() + b"\n")

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Refuse other users: the names of these sockets are no secret."""
        self._transport = cast(asyncio.Transport, transport)
        peer = cast(socket.socket, transport.get_extra_info("socket"))
        _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        if uid != os.getuid():
            self.close()

    def data_received(self, data: bytes) -> None:
        """Take every complete line."""
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > MAX_LINE_BYTES:
            log.warning("a rank's line is too long", bytes=len(self._received))
            self.close()
        for line in lines:
            try:
                self._take(line)
            except (ValidationError, ValueError, KeyError) as error:
                log.warning("a rank said what is no report", error=str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        """The rank is gone, or its generation is over."""
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
            self.close()  # The rank waits for that before it exits.


def _note(line: bytes) -> dict[str, Any] | None:
    """A line that ranks say to their agent only: no report, and it goes no further."""
    if b'"dropped"' not in line[:30] and b'"last_words"' not in line[:30]:
        return None  # Almost all lines: not worth parsing twice.
    note: Any = json.loads(line)
    if not isinstance(note, dict) or cast(dict[str, Any], note).get("kind") not in ("dropped", "last_words"):
        return None
    return cast(dict[str, Any], note)
