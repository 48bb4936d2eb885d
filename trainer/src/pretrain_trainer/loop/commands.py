"""Commands of the coordinator: all ranks agree on them at a step boundary, and hold there on request."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from pretrain_api.messages.protocol import Command
from pretrain_api.messages.reports import Held, Resumed
from pretrain_sdk.rank_link import AgentLink


class StepCommands:
    """The commands that this rank knows. Each is carried out once, on all ranks at the same step boundary."""

    def __init__(self, link: AgentLink, clock: Callable[[], float]) -> None:
        self._link = link
        self._clock = clock
        self._generation = link.generation.number if link.generation else None
        self._pending: dict[str, Command] = {}
        self._agreed: set[str] = set()

    def pending(self) -> bool:
        """Return True if this rank knows a command that was not agreed on; to be sent with the step's reduction."""
        self._take(self._link.commands())
        return bool(self._pending)

    def agree(self, world_size: int) -> tuple[Command, ...]:
        """Return the commands of all ranks in one order. Collective; called where the reduction announced one."""
        known: list[tuple[Command, ...] | None] = [None] * world_size
        dist.all_gather_object(known, tuple(self._pending.values()))
        commands = {command.id: command for part in known for command in part or ()}
        self._agreed.update(commands)
        self._pending.clear()
        return tuple(commands[name] for name in sorted(commands))

    def hold(self, commands: tuple[Command, ...], step: int, checkpoint: str) -> None:
        """Report that the checkpoint of this step is committed, and wait for the longest time of the commands.

        A new generation ends the hold by killing this process. Commands that arrive meanwhile are carried out at the
        next boundary.
        """
        for command in commands:
            self._link.report(Held(command_id=command.id, step=step, checkpoint=checkpoint))
        seconds = max(command.hold_seconds for command in commands)
        deadline = self._clock() + seconds
        while (remaining := deadline - self._clock()) > 0:
            self._take(self._link.wait_command(remaining))
        for command in commands if seconds else ():
            self._link.report(Resumed(command_id=command.id, step=step))

    def _take(self, commands: tuple[Command, ...]) -> None:
        for command in commands:
            if command.generation == self._generation and command.id not in self._agreed:
                self._pending[command.id] = command
