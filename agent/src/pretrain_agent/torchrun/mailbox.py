"""Mailbox through which the event loop hands generations to torchrun's thread."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from pretrain_api.messages.protocol import Generation, Member


class MailboxClosed(Exception):
    """The agent is shutting down: there are no more generations."""


@dataclass(frozen=True)
class Assignment:
    """A generation and this agent's place in it."""

    generation: Generation
    member: Member
    """This agent."""
    socket_path: str
    """Socket for the local ranks of this generation only, so that no earlier rank can report in it."""

    @property
    def first_rank(self) -> int:
        """Global rank of this agent's first process."""
        return sum(member.processes for member in self.generation.members if member.rank < self.member.rank)


class Mailbox:
    """Latest assignment, handed from one thread to another. All methods are thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._assignment: Assignment | None = None
        self._taken = 0
        self._closed = False
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable after every change; torchrun's thread polls it together with its processes."""

    def announce(self, assignment: Assignment) -> None:
        """Run this generation from now on."""
        with self._changed:
            self._assignment = assignment
            self._wake()

    def withdraw(self) -> None:
        """Run nothing until the next announcement."""
        with self._changed:
            self._assignment = None
            self._wake()

    def close(self) -> None:
        """Stop running generations."""
        with self._changed:
            self._closed = True
            self._assignment = None
            self._wake()

    def take(self) -> Assignment:
        """Wait for an assignment not taken yet. Raises MailboxClosed on shutdown."""
        with self._changed:
            while True:
                if self._closed:
                    raise MailboxClosed
                if self._assignment is not None and self._assignment.generation.number > self._taken:
                    self._taken = self._assignment.generation.number
                    return self._assignment
                self._changed.wait()

    def is_current(self, number: int) -> bool:
        """Return True while this generation is the one to run."""
        with self._changed:
            return self._assignment is not None and self._assignment.generation.number == number

    @property
    def closed(self) -> bool:
        """True once the agent shuts down."""
        with self._changed:
            return self._closed

    def clear_wake(self) -> None:
        """Clear `wake_fd` until the next change."""
        try:
            os.eventfd_read(self.wake_fd)
        except BlockingIOError:
            return

    def _wake(self) -> None:
        os.eventfd_write(self.wake_fd, 1)
        self._changed.notify_all()
