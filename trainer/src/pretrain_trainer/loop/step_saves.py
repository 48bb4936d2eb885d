"""Saves of the loop: the policy applied to one model and optimizer, through the checkpointer that holds the save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import nn
from torch.optim import Optimizer

from pretrain_api.checkpoint.lineage import Manifest, Rollback, manifest_key, parse_manifest_key
from pretrain_api.messages.reports import Saved, SaveFailed
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.loop.save_policy import SavePolicy
from pretrain_trainer.stability.guard import RollbackRequest


class CheckpointerPort(Protocol):
    """The methods of `pretrain_trainer.checkpoint.Checkpointer` that the training loop calls."""

    @property
    def parent(self) -> Manifest | None:
        """The checkpoint that this generation resumes from; None on a fresh start."""
        ...

    @property
    def recalled(self) -> bool:
        """True if a state in the memory of workers was restored, which is later than the parent."""
        ...

    @property
    def rollbacks(self) -> tuple[Rollback, ...]:
        """The rollbacks of this job, oldest first."""
        ...

    def go_back(self, wish: RollbackRequest) -> None:
        """Add a lineage record whose parent precedes a divergence. Collective."""
        ...

    def restore(self, model: nn.Module, optimizer: Optimizer) -> TrainingProgress:
        """Verify and load the latest state; do nothing if there is none. Collective."""
        ...

    def save(self, progress: TrainingProgress, model: nn.Module, optimizer: Optimizer) -> float:
        """Start a save; return the seconds that this call blocked."""
        ...

    def remember(self, progress: TrainingProgress, model: nn.Module, optimizer: Optimizer) -> float:
        """Keep this state in memory; return the seconds that this call blocked."""
        ...

    def settle_memory(self) -> None:
        """Wait until the last state in memory is complete."""
        ...

    def poll(self) -> tuple[Saved | SaveFailed, ...]:
        """Return the outcomes of saves since the last call, on rank 0."""
        ...

    def wait(self) -> str | None:
        """Wait for the running save; return on all ranks the manifest key of the last save, None if it failed."""
        ...

    def look(self) -> None:
        """Raise an Obstacle, on all ranks alike, while the store cannot be written. Collective."""
        ...

    def close(self) -> None:
        """Release threads and memory."""
        ...


class StepSaves:
    """The saves of one run. Holds the policy's state and no save: that is the checkpointer's."""

    def __init__(
        self,
        checkpointer: CheckpointerPort,
        model: nn.Module,
        optimizer: Optimizer,
        policy: SavePolicy,
        clock: Callable[[], float],
    ) -> None:
        self._checkpointer = checkpointer
        self._model = model
        self._optimizer = optimizer
        self._policy = policy
        self._clock = clock
        self._stall = 0.0
        self.restart()

    def restart(self) -> None:
        """Count the interval from the restored checkpoint."""
        parent = self._checkpointer.parent
        self._policy = self._policy.restart(parent.step if parent else 0, self._clock())

    def due(self, step: int) -> bool:
        """Decide on rank 0 whether to save after this step; the others learn it with the step's reduction."""
        return self._policy.due(step, self._clock())

    def before_step(self, step: int) -> None:
        """Complete the previous state in memory if this step replaces it.

        No rank enters the step's collectives before all have completed theirs: a complete state always remains.
        """
        if self._policy.due_in_memory(step):
            self._checkpointer.settle_memory()

    def after_step(self, progress: TrainingProgress, *, due: bool, sound: bool) -> None:
        """Keep the state in memory if it is due, and start a save if `due`; defer it unless the state is `sound`."""
        if self._policy.due_in_memory(progress.step):
            self._stall += self._checkpointer.remember(progress, self._model, self._optimizer)
        if due and sound:
            self.begin(progress)
        elif due:
            self._policy = self._policy.defer()

    def begin(self, progress: TrainingProgress) -> None:
        """Start a save; blocks for the copy only."""
        self._policy = self._policy.restart(progress.step, self._clock())
        stall = self._checkpointer.save(progress, self._model, self._optimizer)
        self._stall += stall
        self._policy = self._policy.after_stall(stall)

    def outcomes(self) -> tuple[Saved | SaveFailed, ...]:
        """Return the saves that ended since the last call, on rank 0."""
        outcomes = self._checkpointer.poll()
        for outcome in outcomes:
            if isinstance(outcome, Saved):
                self._policy = self._policy.after_save(outcome.seconds)
        return outcomes

    def take_stall(self) -> float:
        """Return the seconds that saves have blocked the loop since the last call."""
        stall, self._stall = self._stall, 0.0
        return stall

    def commit(self, progress: TrainingProgress) -> str | None:
        """Return the manifest key of a committed checkpoint of this step; None if saving failed. Collective.

        Joins a save of this step that is under way, and saves unless the state is that of the parent.
        """
        parent = self._checkpointer.parent
        if parent is not None and parent.step == progress.step:
            return manifest_key(parent.generation, parent.step)
        key = self._checkpointer.wait()
        if _step_of(key) != progress.step:
            self.begin(progress)
            key = self._checkpointer.wait()
        return key if _step_of(key) == progress.step else None


def _step_of(key: str | None) -> int | None:
    parsed = parse_manifest_key(key) if key else None
    return parsed[1] if parsed else None
