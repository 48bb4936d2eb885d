"""What a hello says of generations, held against what the coordinator knows: either of them may know less."""

from __future__ import annotations

from typing import Literal

from pretrain_operator.coordinator.members import Agent
from pretrain_operator.coordinator.running_generation import Running

Claim = Literal["agrees", "is newer", "disagrees", "lost its ranks", "is behind"]


def weigh(agent: Agent, running: Running, others: tuple[Agent, ...]) -> Claim:
    """How the agent's hello stands to the current generation. `is behind`: it is to be told what holds now."""
    claim, place = agent.claim, running.member(agent.id)
    if claim == running.generation:
        return "agrees"
    if claim is not None and claim.number > running.number and running.adopted:
        # An adopted generation whose members are none of the newer one's is a leftover, and so are they.
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
