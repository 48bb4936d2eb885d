"""Changes on purpose (growing, shrinking, leaving, suspending): at a step boundary, with a checkpoint in force."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain_api.messages.protocol import Command
from pretrain_operator.coordinator.formation import choose
from pretrain_operator.coordinator.members import Agent
from pretrain_operator.coordinator.running_generation import Order, Running
from pretrain_operator.coordinator.settings import Settings
from pretrain_operator.coordinator.types import Want
from pretrain_operator.facts.fact import Cause


@dataclass(frozen=True)
class Step:
    """What to do now: end the generation, or send a command to its members, or neither."""

    end: Cause | None = None
    message: str = ""
    command: Command | None = None


NOTHING = Step()


class Boundary:
    """Decides when ranks are asked to hold, and what follows when they do."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._backoff = settings.command_backoff
        self._not_before = float("-inf")

    def decide(
        self, running: Running, members: tuple[Agent | None, ...], fit: tuple[Agent, ...], want: Want, now: float
    ) -> Step:
        """The next move towards the wanted members. `members` by rank, None where the agent is not known."""
        self._give_up_in_vain(running, now)
        cause = intended_change(members, fit, want, now, self._settings)
        if cause is None:
            if running.held is not None and now - running.held_at >= self._settings.idle_hold:
                return Step(end="Resized", message="ranks held for a change that is no longer wanted")
            return NOTHING
        if running.held is not None:
            self._backoff = self._settings.command_backoff
            return Step(end=cause)
        if not running.stepped:
            # Nothing was done that could be lost; but a start is not disturbed for the sake of growing.
            return Step(end=cause) if cause in ("WorkerLeft", "Suspended") else NOTHING
        if cause == "WorkerLeft" or running.order is not None or now < self._not_before:
            return NOTHING  # The agent that leaves commands the checkpoint itself.
        settings = self._settings
        hold_seconds = settings.suspend_hold_seconds if cause == "Suspended" else settings.hold_seconds
        running.order = Order(id=f"{running.number}-{now * 1000:.0f}", sent_at=now)
        return Step(command=Command(id=running.order.id, generation=running.number, hold_seconds=hold_seconds))

    def _give_up_in_vain(self, running: Running, now: float) -> None:
        order = running.order
        if order is None or running.held is not None:
            return
        if order.id in running.resumed or now - order.sent_at >= self._settings.command_timeout:
            running.order = None
            self._not_before = now + self._backoff
            self._backoff = min(2 * self._backoff, self._settings.command_backoff_at_most)


def intended_change(
    members: tuple[Agent | None, ...], fit: tuple[Agent, ...], want: Want, now: float, settings: Settings
) -> Cause | None:
    """Why the generation should make room for another one, or None.

    `fit`: agents that may be in the next one, current members included even if their connection is broken just now.
    """
    if not want.running:
        return "Suspended"
    known = [agent for agent in members if agent is not None]
    if any(agent.leaving for agent in known):
        return "WorkerLeft"
    if len(known) < len(members):
        return None
    current = {agent.id for agent in known}
    chosen = choose(fit, want, [agent.id for agent in known])
    if not chosen or len(chosen) < want.min:
        return None
    if not current.issubset(agent.id for agent in chosen):
        return "Resized"
    newcomers = [agent for agent in chosen if agent.id not in current]
    if newcomers and all(now - (agent.joined_at or 0.0) >= settings.settle for agent in newcomers):
        return "WorkerJoined"
    return None
