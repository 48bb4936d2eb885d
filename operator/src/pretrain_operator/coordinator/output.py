"""What an input of the coordinator calls for, gathered while it is worked out."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain_api.messages.protocol import CoordinatorMessage
from pretrain_operator.coordinator.members import Agent, ConnectionId
from pretrain_operator.facts.fact import CoordinatorFact


@dataclass(frozen=True)
class Output:
    """What an input calls for, in this order: facts first, then messages, then connections to close once sent."""

    sends: tuple[tuple[ConnectionId, CoordinatorMessage], ...] = ()
    closes: tuple[ConnectionId, ...] = ()
    facts: tuple[CoordinatorFact, ...] = ()


class Outbox:
    """Gathers an Output. Every message carries the epoch."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._sends: list[tuple[ConnectionId, CoordinatorMessage]] = []
        self._closes: list[ConnectionId] = []
        self._facts: list[CoordinatorFact] = []

    def send(self, connection: ConnectionId, message: CoordinatorMessage) -> None:
        """Say something on a connection."""
        self._sends.append((connection, message.model_copy(update={"epoch": self._epoch})))

    def tell(self, agent: Agent, message: CoordinatorMessage) -> None:
        """Say something to an agent if it is connected; its next hello shows what it missed."""
        if agent.connection is not None:
            self.send(agent.connection, message)

    def close(self, connection: ConnectionId) -> None:
        """Close a connection when all that was said before is sent."""
        self._closes.append(connection)

    def note(self, fact: CoordinatorFact) -> None:
        """Something happened."""
        self._facts.append(fact)

    def empty(self) -> Output:
        """All that was gathered since the last time."""
        output = Output(tuple(self._sends), tuple(self._closes), tuple(self._facts))
        self._sends, self._closes, self._facts = [], [], []
        return output
