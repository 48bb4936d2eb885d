"""Reports of steps: rank 0 reports the whole job, the others their own part."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from pretrain_api.messages.reports import Progress as ProgressReport
from pretrain_api.messages.reports import StepDone
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.ranks import Ranks
from pretrain_trainer.observability.memory import accelerator_memory, process_memory
from pretrain_trainer.observability.mfu import Utilization
from pretrain_trainer.observability.step_timing import StepTimer, StepTimes
from pretrain_trainer.parallelism.gradients import Reduced

DIGITS = 6
"""Decimals of seconds, to keep reports small."""
LATELY_SECONDS = 10.0
"""Longer than a report takes to a coordinator that is up."""
LATELY_STEPS = 100


class StepRecorder:
    """Measures the completed steps of this rank."""

    def __init__(self, ranks: Ranks, timer: StepTimer, utilization: Utilization) -> None:
        self._ranks = ranks
        self._timer = timer
        self._utilization = utilization

    def record(self, progress: TrainingProgress, reduced: Reduced, rate: float, stall: float) -> StepDone:
        """End the step's time, `stall` included, and return its report."""
        times = self._timer.end(stall)
        self._utilization.step_done()
        speed = self._timer.tokens_per_second
        mfu = self._utilization.of_speed(speed)
        return step_done(self._ranks, progress, reduced, rate, times, speed, mfu)


def step_done(
    ranks: Ranks,
    progress: TrainingProgress,
    reduced: Reduced,
    rate: float,
    times: StepTimes,
    tokens_per_second: float,
    mfu: float | None,
) -> StepDone:
    """Build the report of the step that `progress` ends with, with the times and the memory of this rank."""
    memory = accelerator_memory(ranks.device)
    return StepDone(
        step=progress.step,
        loss=reduced.loss,
        grad_norm=reduced.norm,
        learning_rate=rate,
        tokens=progress.tokens,
        tokens_per_second=tokens_per_second,
        seconds=round(times.seconds, DIGITS),
        data_seconds=round(times.data, DIGITS),
        compute_seconds=round(times.compute, DIGITS),
        reduce_seconds=round(times.reduce, DIGITS),
        optimizer_seconds=round(times.optimizer, DIGITS),
        stall_seconds=round(times.stall, DIGITS),
        mfu=None if mfu is None else round(mfu, DIGITS),
        loss_contribution=reduced.contribution,
        memory=memory or process_memory() if ranks.first else memory,
    )


def own_part(done: StepDone) -> ProgressReport:
    """Return the part of a report that is this rank's own."""
    own: dict[str, Any] = {name: getattr(done, name) for name in ProgressReport.model_fields if name != "kind"}
    if not math.isfinite(done.loss):
        own["loss_contribution"] = None
    return ProgressReport(**own)


def lately(before: Sequence[StepDone], done: StepDone) -> tuple[StepDone, ...]:
    """Return `done` and the steps of the last seconds before it, whose reports a lost worker may not have sent."""
    newest_first = (done, *reversed(before))[:LATELY_STEPS]
    ages = itertools.accumulate((step.seconds for step in newest_first), initial=0.0)
    return tuple(step for step, age in zip(newest_first, ages, strict=False) if age < LATELY_SECONDS)[::-1]
