"""Evaluation of a hello: protocol checks, the workers that failed them, and the claimed generation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from pretrain_api.messages.protocol import PROTOCOL_VERSION, Hello, Shutdown
from pretrain_operator.coordinator.members import Agent, ConnectionId, Roster
from pretrain_operator.coordinator.message_parser import Refusal
from pretrain_operator.coordinator.output import OutputBuffer
from pretrain_operator.coordinator.running_generation import RunningGeneration

ClaimResult = Literal["agrees", "is newer", "disagrees", "lost its ranks", "is behind"]


def rejection(hello: Hello, job_uid: str, epoch: int) -> str | None:
    """Return why this coordinator cannot serve the agent, or None."""
    if hello.version != PROTOCOL_VERSION:
        return f"protocol version {hello.version} is not supported, only {PROTOCOL_VERSION}: use one image"
    if hello.job_uid != job_uid:
        return f"job {hello.job_uid} is not coordinated here, only {job_uid}"
    if hello.highest_epoch > epoch:
        return f"epoch {epoch} is superseded by epoch {hello.highest_epoch}: connect to the newer operator"
    return None


def wrong_processes(hello: Hello, wanted: int | None) -> Refusal | None:
    """Compare the number of training processes with the job's, or with that of the generation that runs already."""
    members = hello.generation.members if hello.generation is not None else ()
    own = next((member.processes for member in members if member.agent_id == hello.agent_id), wanted)
    if own is None or hello.processes == own:
        return None
    return Refusal("WrongProcesses", f"invalid message: hello.processes: {hello.processes}, but the worker has {own}")


def compare_claim(agent: Agent, running: RunningGeneration, others: tuple[Agent, ...]) -> ClaimResult:
    """Compare the generation of the agent's hello with the current one; either side may know less.

    `is behind`: the agent receives the current state next.
    """
    claim, place = agent.claim, running.member(agent.id)
    if claim == running.generation:
        return "agrees"
    if claim is not None and claim.number > running.number and running.adopted:
        # If no joined agent contests the newer generation, the adopted one and its members are leftovers.
        members = {member.agent_id for member in claim.members}
        contested = any(other.id in members and other.joined and other.claim != claim for other in others)
        return "disagrees" if contested else "is newer"
    if place is None:
        return "is behind"
    if claim is not None and claim.number >= running.number:
        return "disagrees"
    if claim is None and agent.hello.highest_number >= running.number:
        return "lost its ranks"
    return "disagrees" if running.adopted else "is behind"


class FailedWorkers:
    """Workers that sent what no correct worker sends. Their pods join no generation and are replaced."""

    def __init__(self, roster: Roster, outbox: OutputBuffer) -> None:
        self._roster = roster
        self._outbox = outbox
        self._errors: dict[tuple[int, int], str] = {}
        """Error by pod."""

    def refuse(self, connection: ConnectionId, pod: tuple[int, int] | None, refusal: Refusal) -> Agent | None:
        """Record a refused message; returns the agent of the connection, or else of its authenticated pod."""
        agent = self._roster.on(connection) or (self._roster.of_pod(pod) if pod is not None else None)
        pod = agent.pod if agent is not None else pod
        self._outbox.refuse(replace(refusal, pod=pod))
        if pod is not None:
            self._errors[pod] = refusal.message
        return agent

    def forget(self, pods: Collection[tuple[int, int]]) -> None:
        """Forget all but these pods."""
        self._errors = {pod: error for pod, error in self._errors.items() if pod in pods}

    def dismiss(self, processes: int | None) -> None:
        """Shut failed workers down, newcomers with another number of processes than the job's included."""
        for agent in self._roster.agents:
            wrong = None if agent.joined else wrong_processes(agent.hello, processes)
            if wrong is not None and agent.connection is not None and agent.pod not in self._errors:
                self.refuse(agent.connection, agent.pod, wrong)
            if (error := self._errors.get(agent.pod)) is not None:
                self._outbox.send_to(agent, Shutdown(reason="removed", message=error))
                if agent.connection is not None:
                    self._outbox.close(agent.connection)
                self._roster.remove(agent)
