"""Output of the coordinator's state machine, collected while it processes an input."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain_api.messages.protocol import CoordinatorMessage
from pretrain_operator.coordinator.members import Agent, ConnectionId
from pretrain_operator.coordinator.message_parser import Refusal
from pretrain_operator.facts.fact import CoordinatorFact


@dataclass(frozen=True)
class CoordinatorOutput:
    """Effects of one input, in this order: publish facts, send messages, close connections once they are flushed."""

    sends: tuple[tuple[ConnectionId, CoordinatorMessage], ...] = ()
    closes: tuple[ConnectionId, ...] = ()
    facts: tuple[CoordinatorFact, ...] = ()
    refusals: tuple[Refusal, ...] = ()


class OutputBuffer:
    """Collects a CoordinatorOutput and stamps every message with the epoch."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._sends: list[tuple[ConnectionId, CoordinatorMessage]] = []
        self._closes: list[ConnectionId] = []
        self._facts: list[CoordinatorFact] = []
        self._refusals: list[Refusal] = []

    def send(self, connection: ConnectionId, message: CoordinatorMessage) -> None:
        """Send a message on a connection."""
        self._sends.append((connection, message.model_copy(update={"epoch": self._epoch})))

    def send_to(self, agent: Agent, message: CoordinatorMessage) -> None:
        """Send a message to a connected agent; a disconnected one catches up with its next hello."""
        if agent.connection is not None:
            self.send(agent.connection, message)

    def close(self, connection: ConnectionId) -> None:
        """Close a connection once all earlier messages are flushed."""
        self._closes.append(connection)

    def publish(self, fact: CoordinatorFact) -> None:
        """Publish a fact."""
        self._facts.append(fact)

    def refuse(self, refusal: Refusal) -> None:
        """Report a refused message."""
        self._refusals.append(refusal)

    def drain(self) -> CoordinatorOutput:
        """Return the output since the last call."""
        output = CoordinatorOutput(tuple(self._sends), tuple(self._closes), tuple(self._facts), tuple(self._refusals))
        self._sends, self._closes, self._facts, self._refusals = [], [], [], []
        return output
