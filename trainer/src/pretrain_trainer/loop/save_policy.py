"""When the loop saves, and how it waits for a save that must be in force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import nn
from torch.optim import Optimizer

from pretrain_api.checkpoint.lineage import Manifest, Rollback, manifest_key, parse_manifest_key
from pretrain_api.messages.reports import Saved, SaveFailed
from pretrain_api.spec.job import Interval, Memory
from pretrain_trainer.core.progress import Progress
from pretrain_trainer.stability.guard import RollbackRequest

DEFAULT_STEPS = 50
STALL_RATIO = 100
"""Without a configured interval a save's blocking copy may take one part in so many of the time …"""
BUSY_RATIO = 2
"""… and a save may be under way for at most one part in so many."""


class Checkpointer(Protocol):
    """The part of `pretrain_trainer.checkpoint.Checkpointer` that the training loop uses."""

    @property
    def parent(self) -> Manifest | None:
        """What this generation goes on from; None on a fresh start."""
        ...

    @property
    def recalled(self) -> bool:
        """Whether a later state was restored, from the memory of workers, than that of the parent."""
        ...

    @property
    def rollbacks(self) -> tuple[Rollback, ...]:
        """Those of this job so far, oldest first."""
        ...

    def go_back(self, wish: RollbackRequest) -> None:
        """Enter the history under a new number with a parent from before a divergence. Collective."""
        ...

    def restore(self, model: nn.Module, optimizer: Optimizer) -> Progress:
        """Load the newest state after checking it, collectively; without one do nothing."""
        ...

    def save(self, progress: Progress, model: nn.Module, optimizer: Optimizer) -> float:
        """Start a save; the seconds that this call blocked."""
        ...

    def remember(self, progress: Progress, model: nn.Module, optimizer: Optimizer) -> float:
        """Keep this state in memory; the seconds that this call blocked."""
        ...

    def settle_memory(self) -> None:
        """Wait until the last state in memory is whole."""
        ...

    def poll(self) -> tuple[Saved | SaveFailed, ...]:
        """Outcomes since the last call, on rank 0."""
        ...

    def wait(self) -> str | None:
        """Wait for the running save: the key of its manifest, None if it failed; the same on all ranks."""
        ...

    def look(self) -> None:
        """Raise an ObstacleError, on all ranks alike, when nothing can be saved now. Collective."""
        ...

    def close(self) -> None:
        """Let go of threads and processes."""
        ...


class Saves:
    """The loop's checkpoints of one model and optimizer."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        model: nn.Module,
        optimizer: Optimizer,
        interval: Interval | None,
        clock: Callable[[], float],
        memory: Memory | None = None,
    ) -> None:
        self._memory = memory
        self._checkpointer = checkpointer
        self._model = model
        self._optimizer = optimizer
        self._interval = interval
        self._clock = clock
        self._put_off = False
        self._pause = 0.0
        self._stall = 0.0
        self.go_back()

    def go_back(self) -> None:
        """The state is that of the checkpointer's parent."""
        parent = self._checkpointer.parent
        self._last_step = parent.step if parent else 0
        self._in_force = manifest_key(parent.generation, parent.step) if parent else None
        self._last_begun = self._clock()
        self._put_off = False

    def put_off(self) -> None:
        """A save that was wanted had better not be made now: as soon as it can be."""
        self._put_off = True

    def wanted(self, step: int) -> bool:
        """Whether to save after this step, by rank 0's clock: the others learn of it with the step's reduction.

        Without a configured interval: every 50 steps, but less often where saves are slow.
        """
        elapsed = self._clock() - self._last_begun
        if self._put_off:
            return True
        if self._interval is None:
            return step - self._last_step >= DEFAULT_STEPS and elapsed >= self._pause
        if self._interval.steps is not None:
            return step % self._interval.steps == 0
        assert self._interval.duration is not None  # Interval has exactly one of the two
        return elapsed >= self._interval.duration.total_seconds()

    def before(self, step: int) -> None:
        """This step begins. If it ends with a state in memory, the one before that is whole first.

        No rank passes the step's collectives before all have come here: so a whole state is always left.
        """
        if self._is_remembered(step):
            self._checkpointer.settle_memory()

    def remember(self, progress: Progress) -> None:
        """Keep this state in memory if it is its turn; blocks for the copy only."""
        if self._is_remembered(progress.step):
            self._stall += self._checkpointer.remember(progress, self._model, self._optimizer)

    def _is_remembered(self, step: int) -> bool:
        return self._memory is not None and step % self._memory.every_steps == 0

    def begin(self, progress: Progress) -> None:
        """Start to save; blocks for the copy only."""
        self._last_step, self._last_begun, self._put_off = progress.step, self._clock(), False
        stall = self._checkpointer.save(progress, self._model, self._optimizer)
        self._stall += stall
        self._pause = max(self._pause, STALL_RATIO * stall)

    def outcomes(self) -> tuple[Saved | SaveFailed, ...]:
        """What became of saves since the last call; rank 0 learns from it how long they take."""
        outcomes = self._checkpointer.poll()
        for outcome in outcomes:
            if isinstance(outcome, Saved):
                self._pause = max(self._pause, BUSY_RATIO * outcome.seconds)
        return outcomes

    def take_stall(self) -> float:
        """Seconds that saves have blocked the loop since the last call."""
        stall, self._stall = self._stall, 0.0
        return stall

    def settle(self, progress: Progress) -> str | None:
        """The manifest's key of a checkpoint of just this step, once it is in force; None if saving failed. Collective.

        Joins a save of this step that is under way.
        """
        if _step_of(self._in_force) == progress.step:
            return self._in_force
        key = self._checkpointer.wait()
        if _step_of(key) != progress.step:
            self.begin(progress)
            key = self._checkpointer.wait()
        if _step_of(key) != progress.step:
            return None
        self._in_force = key
        return key


def _step_of(key: str | None) -> int | None:
    parsed = parse_manifest_key(key) if key else None
    return parsed[1] if parsed else None
