"""One optimizer update: micro-batches forward and backward, the reduction, the learning rate, the optimizer."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace

import torch

from pretrain_api.lineage import data_step
from pretrain_trainer.errors import LossNotFinite
from pretrain_trainer.gradients import Reduced, Signals
from pretrain_trainer.optimizer import set_learning_rate
from pretrain_trainer.progress import Progress
from pretrain_trainer.schedule import learning_rate
from pretrain_trainer.setup import Run
from pretrain_trainer.shares import largest_share, share

SPEED_STEPS = 20
"""Tokens per second are taken over so many steps."""


class Pace:
    """Where the time of steps goes. Evaluations and holds between steps are not in it."""

    def __init__(self, step_tokens: int) -> None:
        self._step_tokens = step_tokens
        self._recent: deque[float] = deque(maxlen=SPEED_STEPS)
        self._began = 0.0
        self.data_seconds = 0.0

    def begin(self) -> None:
        """A step begins: its first part is reading data."""
        self._began = time.perf_counter()

    def data_read(self) -> None:
        """The step's data is there."""
        self.data_seconds = time.perf_counter() - self._began

    def end(self, stall: float) -> float:
        """The step's seconds, those included that the save before it blocked."""
        seconds = time.perf_counter() - self._began + stall
        self._recent.append(seconds)
        return seconds

    @property
    def tokens_per_second(self) -> float:
        """Over the last few steps."""
        return self._step_tokens * len(self._recent) / sum(self._recent)


def compute_gradients(run: Run, progress: Progress, signals: Signals, pace: Pace) -> Reduced:
    """Gradients of the next step, summed over all micro-batches and ranks. Collective."""
    training, ranks, step = run.training, run.ranks, progress.step + 1
    total = training.batch.sequences // training.batch.micro_batch
    mine = share(total, ranks.rank, ranks.world_size)
    micro_batches = run.batches.of_step(step, progress.skipped, mine)
    pace.data_read()

    numbered_from = (data_step(step, progress.skipped) - 1) * total + mine.start
    passes = largest_share(total, ranks.world_size) if run.gradients.padded else len(mine)
    run.gradients.begin()
    for index in range(passes):
        windows, weight = run.batches.filler, 0.0
        if index < len(mine):
            windows, weight = micro_batches[index], 1.0 / run.step_tokens
        if run.dropout:
            torch.manual_seed(dropout_seed(training.seed, numbered_from + index))
        loss = run.loss(run.model, windows.to(ranks.device)) * weight
        run.gradients.add(loss, last=index == passes - 1)
    return run.gradients.reduce(signals, training.optimizer.clip)


def update(run: Run, progress: Progress, reduced: Reduced) -> tuple[Progress, float]:
    """(the progress after the update, its learning rate). Raises LossNotFinite instead of spoiling the weights."""
    step = progress.step + 1
    if not reduced.finite:
        raise LossNotFinite(
            f"step {step}: loss {reduced.loss}, gradient norm {reduced.norm}: "
            "lower training.optimizer.learningRate or lengthen training.schedule.warmupSteps"
        )
    rate = learning_rate(run.training.schedule, run.training.optimizer.learning_rate, step, run.steps)
    set_learning_rate(run.optimizer, rate)
    run.optimizer.step()
    return replace(progress, step=step, tokens=progress.tokens + run.step_tokens), rate


def dropout_seed(seed: int, micro_batch: int) -> int:
    """The seed of a micro-batch's dropout: by its number in the data, so the same on whichever rank computes it."""
    return seed << 33 ^ micro_batch
