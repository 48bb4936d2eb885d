"""Evaluation of a hello: protocol checks, and its generation compared with the coordinator's current one."""

from __future__ import annotations

from typing import Literal

from pretrain_api.messages.protocol import PROTOCOL_VERSION, Hello
from pretrain_operator.coordinator.members import Agent
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
