"""Policy of saves: the steps after which the loop saves, as a pure function of steps and times."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pretrain_api.spec.job import Interval, Memory

DEFAULT_STEPS = 50
STALL_RATIO = 100
"""Without a configured interval the blocking copy of a save takes at most 1 / STALL_RATIO of the time."""
BUSY_RATIO = 2
"""Without a configured interval a save is under way at most 1 / BUSY_RATIO of the time."""


@dataclass(frozen=True)
class SavePolicy:
    """Times in seconds of one clock. Methods that change the policy return the new one."""

    interval: Interval | None
    memory: Memory | None = None
    last_step: int = 0
    """The step of the last save, or of the checkpoint that was restored."""
    last_started: float = 0.0
    pause: float = 0.0
    """The least time between the starts of two saves without a configured interval."""
    deferred: bool = False

    def due(self, step: int, now: float) -> bool:
        """Decide whether to save after this step. Without an interval: every 50 steps, fewer where saves are slow."""
        elapsed = now - self.last_started
        if self.deferred:
            return True
        if self.interval is None:
            return step - self.last_step >= DEFAULT_STEPS and elapsed >= self.pause
        if self.interval.steps is not None:
            return step % self.interval.steps == 0
        assert self.interval.duration is not None  # Interval has exactly one of the two
        return elapsed >= self.interval.duration.total_seconds()

    def due_in_memory(self, step: int) -> bool:
        """Decide whether to keep the state after this step in memory."""
        return self.memory is not None and step % self.memory.every_steps == 0

    def defer(self) -> SavePolicy:
        """Postpone a save that was due to the next step that may be saved."""
        return replace(self, deferred=True)

    def restart(self, step: int, now: float) -> SavePolicy:
        """Count from this step, whose state was saved or restored."""
        return replace(self, last_step=step, last_started=now, deferred=False)

    def after_stall(self, seconds: float) -> SavePolicy:
        """Learn from a save that blocked the loop for this time."""
        return replace(self, pause=max(self.pause, STALL_RATIO * seconds))

    def after_save(self, seconds: float) -> SavePolicy:
        """Learn from a save that took this time until it was committed."""
        return replace(self, pause=max(self.pause, BUSY_RATIO * seconds))
