"""Link of a rank to its agent over a Unix socket: sends reports and receives commands without blocking a step.

The socket carries JSON lines. The rank's first line is `Started`; the agent answers with the `Generation`, then sends
`Command` lines. There is no thread: all I/O happens in the rank's own calls.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from pydantic import ValidationError

from pretrain_api.messages.protocol import Command, Generation
from pretrain_api.messages.reports import Progress, ReportBody, Started, StepDone

SOCKET_VARIABLE = "PRETRAIN_AGENT_SOCKET"
MAX_PENDING_LINES = 2000
"""Lines buffered for an agent that does not read: 100 s at 20 steps per second."""
CONNECT_SECONDS = 30.0
CLOSE_SECONDS = 1.0
READ_BYTES = 65536


class AgentLink(Protocol):
    """Interface of a rank to its agent."""

    generation: Generation | None
    """Generation of this rank; None without an agent."""

    def report(self, body: ReportBody) -> None:
        """Send a report. Never blocks and never raises; if the agent does not read, the oldest steps are dropped."""
        ...

    def commands(self) -> tuple[Command, ...]:
        """Return the commands received since the last call. Never blocks."""
        ...

    def wait_command(self, timeout: float) -> tuple[Command, ...]:
        """Wait up to `timeout` seconds for a command, while the rank holds."""
        ...

    def close(self) -> None:
        """Send pending reports for at most about a second. Call it before exit."""
        ...


def connect(rank: int, local_rank: int, environ: Mapping[str, str]) -> AgentLink:
    """Connect to the agent that started this process, or return an `UnattendedLink` without an agent.

    Raises ConnectionError if the agent does not answer: the rank's generation is over.
    """
    path = environ.get(SOCKET_VARIABLE)
    if not path:
        return UnattendedLink()
    return SocketLink(path, Started(rank=rank, local_rank=local_rank, pid=os.getpid()))


def socket_address(path: str) -> str:
    """Convert a socket's path to its address; `@name` is in Linux's abstract namespace, which leaves no file behind."""
    return "\0" + path[1:] if path.startswith("@") else path


class UnattendedLink:
    """Link of a rank without an agent: drops reports and receives no commands."""

    generation: Generation | None = None

    def report(self, body: ReportBody) -> None:
        """Do nothing."""

    def commands(self) -> tuple[Command, ...]:
        """Return no commands."""
        return ()

    def wait_command(self, timeout: float) -> tuple[Command, ...]:
        """Sleep for `timeout` seconds."""
        time.sleep(timeout)
        return ()

    def close(self) -> None:
        """Do nothing."""


class _PendingLine(NamedTuple):
    data: bytes
    droppable: bool


class SocketLink:
    """Link over the agent's Unix socket."""

    generation: Generation | None

    def __init__(self, path: str, started: Started) -> None:
        self._pending: deque[_PendingLine] = deque()
        self._partial = b""
        self._received = b""
        self._unreported_drops = 0
        self.dropped = 0
        """Number of reports dropped because the agent did not read."""
        self._open = True
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(CONNECT_SECONDS)
        try:
            self._socket.connect(socket_address(path))
            self._socket.sendall(_encode(started))
            self.generation = Generation.from_json(self._first_line())
        except (OSError, ValidationError) as error:
            self._socket.close()
            raise ConnectionError(
                f"the agent at {path} did not answer with a generation ({error}): this rank's generation is over; exit"
            ) from error
        self._socket.setblocking(False)

    def report(self, body: ReportBody) -> None:
        """Send a report, or buffer it for the next call if the socket is full."""
        if not self._open:
            return
        if len(self._pending) >= MAX_PENDING_LINES:
            self._drop_oldest_step()
        self._pending.append(_PendingLine(_encode(body), isinstance(body, StepDone | Progress)))
        self._flush()

    def commands(self) -> tuple[Command, ...]:
        """Return the commands received since the last call."""
        self._flush()
        self._receive()
        *lines, self._received = self._received.split(b"\n")
        return tuple(command for line in lines if (command := _parse_command(line)) is not None)

    def wait_command(self, timeout: float) -> tuple[Command, ...]:
        """Wait up to `timeout` seconds for a command, and send pending reports meanwhile."""
        deadline = time.monotonic() + timeout
        while True:
            if commands := self.commands():
                return commands
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return ()
            if not self._open:  # The agent is gone, and this process will be killed in a moment.
                time.sleep(remaining)
                return ()
            self._poll(select.POLLIN | (select.POLLOUT if self._waiting else 0), remaining)

    def close(self) -> None:
        """Send pending reports for at most about a second, and close the connection."""
        deadline = time.monotonic() + CLOSE_SECONDS
        self._flush()
        while self._open and self._waiting and (remaining := deadline - time.monotonic()) > 0:
            self._poll(select.POLLOUT, remaining)
            self._flush()
        self._disconnect()

    @property
    def _waiting(self) -> bool:
        return bool(self._partial or self._pending)

    def _poll(self, events: int, timeout: float) -> None:
        poll = select.poll()  # Unlike select(), poll() supports descriptors above 1023, which a rank may have.
        poll.register(self._socket, events)
        poll.poll(timeout * 1000)

    def _first_line(self) -> bytes:
        while b"\n" not in self._received:
            data = self._socket.recv(READ_BYTES)
            if not data:
                raise ConnectionResetError("connection closed")
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        return line

    def _receive(self) -> None:
        while self._open:
            try:
                data = self._socket.recv(READ_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._disconnect()
            self._received += data

    def _flush(self) -> None:
        while self._open and self._waiting:
            if not self._partial:
                self._partial = self._next_line()
            try:
                sent = self._socket.send(self._partial)
            except BlockingIOError:
                return
            except OSError:
                self._disconnect()
                return
            self._partial = self._partial[sent:]

    def _next_line(self) -> bytes:
        if self._unreported_drops:
            line = b'{"kind":"dropped","count":%d}\n' % self._unreported_drops
            self._unreported_drops = 0
            return line
        return self._pending.popleft().data

    def _drop_oldest_step(self) -> None:
        for index, line in enumerate(self._pending):
            if line.droppable:
                del self._pending[index]
                self.dropped += 1
                self._unreported_drops += 1
                return

    def _disconnect(self) -> None:
        self._open = False
        self._pending.clear()
        self._partial = b""
        self._socket.close()


def _encode(body: ReportBody) -> bytes:
    return body.to_json().encode() + b"\n"


def _parse_command(line: bytes) -> Command | None:
    try:
        return Command.from_json(line)
    except ValidationError:
        return None  # From a newer agent: ignored.
