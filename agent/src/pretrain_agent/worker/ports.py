"""Ports of the worker agent: the ranks' launcher, the rendezvous stores and the coordinator connection."""

from __future__ import annotations

from typing import Protocol

from pretrain_api.messages.protocol import AgentMessage


class RankKiller(Protocol):
    """Launcher of the ranks of the generation in the mailbox."""

    def kill_ranks(self) -> None:
        """SIGKILL all running ranks."""
        ...


class RendezvousStores(Protocol):
    """TCPStores that this agent hosts. Both calls may block for some milliseconds."""

    def listen(self, number: int) -> int:
        """Listen for a generation and return the port."""
        ...

    def drop_below(self, number: int) -> None:
        """Stop the stores of earlier generations."""
        ...


class CoordinatorSender(Protocol):
    """Sending side of the connection to the coordinator."""

    @property
    def highest_epoch(self) -> int:
        """Highest epoch received."""
        ...

    def send(self, message: AgentMessage) -> None:
        """Send soon."""
        ...

    def report_added(self, *, urgent: bool) -> None:
        """Send new reports of the buffer, at once or with the next heartbeat."""
        ...

    async def flush(self, timeout: float) -> None:
        """Wait until everything is sent."""
        ...
