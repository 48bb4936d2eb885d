"""The learning rate: a function of the step and nothing else."""

from __future__ import annotations

import math

from pretrain_api.training import Schedule, Training


def total_steps(training: Training, context: int) -> int:
    """Steps of the run: as written, or as many as the tokens need, rounded up."""
    if training.steps is not None:
        return training.steps
    assert training.tokens is not None  # Training takes exactly one of the two
    return -(-training.tokens // (training.batch.sequences * context))


def learning_rate(schedule: Schedule, peak: float, step: int, total: int) -> float:
    """The rate of update `step`, 1..total: a linear warm-up, then the decay down to min_ratio at the last step."""
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    done = (step - schedule.warmup_steps) / max(1, total - schedule.warmup_steps)
    low = schedule.min_ratio
    match schedule.kind:
        case "cosine":
            ratio = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        case "linear":
            ratio = 1 - (1 - low) * min(1.0, done)
        case "wsd":
            decay = schedule.decay_steps or max(1, total // 10)
            ratio = 1 - (1 - low) * min(1.0, max(0.0, (step - (total - decay)) / decay))
        case "constant":
            ratio = 1.0
    return peak * ratio
