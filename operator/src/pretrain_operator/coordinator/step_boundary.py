"""Planned changes (grow, shrink, leave, suspend): at a step boundary, with a committed checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain_api.messages.protocol import Command
from pretrain_operator.coordinator.formation import choose
from pretrain_operator.coordinator.members import Agent
from pretrain_operator.coordinator.running_generation import PendingCheckpointCommand, RunningGeneration
from pretrain_operator.coordinator.types import Want
from pretrain_operator.facts.fact import Cause
from pretrain_operator.liveness.timings import Timings


@dataclass(frozen=True)
class BoundaryAction:
    """The next action: end the generation, send a command to its members, or nothing."""

    end: Cause | None = None
    message: str = ""
    command: Command | None = None


NOTHING = BoundaryAction()


class StepBoundary:
    """Decides when ranks hold for a planned change, and ends the generation once they do."""

    def __init__(self, timings: Timings) -> None:
        self._timings = timings
        self._backoff = timings.command_backoff
        self._not_before = float("-inf")

    def decide(
        self,
        running: RunningGeneration,
        members: tuple[Agent | None, ...],
        fit: tuple[Agent, ...],
        want: Want,
        now: float,
    ) -> BoundaryAction:
        """Return the next action towards the wanted members. `members`: by rank, None for unknown agents."""
        self._expire_command(running, now)
        cause = planned_change(members, fit, want, now, self._timings)
        if cause is None:
            if running.held is not None and now - running.held_at >= self._timings.idle_hold:
                return BoundaryAction(end="Resized", message="ranks held for a change that is no longer wanted")
            return NOTHING
        if running.held is not None:
            self._backoff = self._timings.command_backoff
            return BoundaryAction(end=cause)
        if not running.stepped:
            # No step can be lost yet; growing does not interrupt a start either.
            return BoundaryAction(end=cause) if cause in ("WorkerLeft", "Suspended") else NOTHING
        if cause == "WorkerLeft" or running.command is not None or now < self._not_before:
            return NOTHING  # the leaving agent commands the checkpoint itself
        return self._command_checkpoint(running, cause, now)

    def _command_checkpoint(self, running: RunningGeneration, cause: Cause, now: float) -> BoundaryAction:
        timings = self._timings
        hold_seconds = timings.suspend_hold_seconds if cause == "Suspended" else timings.hold_seconds
        command_id = f"{running.number}-{now * 1000:.0f}"
        running.command = PendingCheckpointCommand(command_id, sent_at=now)
        command = Command(id=command_id, generation=running.number, hold_seconds=hold_seconds)
        return BoundaryAction(command=command)

    def _expire_command(self, running: RunningGeneration, now: float) -> None:
        command = running.command
        if command is None or running.held is not None:
            return
        if command.id in running.resumed or now - command.sent_at >= self._timings.command_timeout:
            running.command = None
            self._not_before = now + self._backoff
            self._backoff = min(2 * self._backoff, self._timings.command_backoff_at_most)


def planned_change(
    members: tuple[Agent | None, ...], fit: tuple[Agent, ...], want: Want, now: float, timings: Timings
) -> Cause | None:
    """Return why the generation should be replaced by another one, or None.

    `fit`: candidates for the next one, including current members whose connection is broken at the moment.
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
    if newcomers and all(now - (agent.joined_at or 0.0) >= timings.settle for agent in newcomers):
        return "WorkerJoined"
    return None
