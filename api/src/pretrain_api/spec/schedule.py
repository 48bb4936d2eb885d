"""Learning-rate schedule: a function of the step only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pretrain_api.spec.training import Training

SchedulePhase = Literal["warm-up", "stable", "decay"]


@dataclass(frozen=True)
class LearningRates:
    """Learning rates of a job. Lengths are in steps; lengths given in tokens may be fractional."""

    kind: Literal["cosine", "linear", "wsd", "constant"]
    peak: float
    low: float
    """Last rate over the peak rate."""
    warmup: float
    decay: float
    """Length of wsd's decay."""
    total: int

    @classmethod
    def of(cls, training: Training) -> LearningRates:
        """Build the schedule of a job."""
        schedule, total = training.schedule, training.total_steps
        decay = training.decay_length if training.decay_length is not None else max(1, total // 10)
        return cls(
            schedule.kind,
            training.optimizer.learning_rate,
            schedule.min_ratio,
            training.warmup_length,
            decay,
            total,
        )

    def at(self, step: int) -> float:
        """Return the rate of update `step`, 1..total: a linear warm-up, then the decay to `low` at the last step."""
        if step <= self.warmup:
            return self.peak * step / self.warmup
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        match self.kind:
            case "cosine":
                ratio = self.low + (1 - self.low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
            case "linear":
                ratio = 1 - (1 - self.low) * min(1.0, done)
            case "wsd":
                ratio = 1 - (1 - self.low) * min(1.0, max(0.0, (step - (self.total - self.decay)) / self.decay))
            case "constant":
                ratio = 1.0
        return self.peak * ratio

    def phase(self, step: int) -> SchedulePhase:
        """Return the phase of update `step`."""
        if step <= self.warmup:
            return "warm-up"
        if self.kind == "constant" or (self.kind == "wsd" and step <= self.total - self.decay):
            return "stable"
        return "decay"
