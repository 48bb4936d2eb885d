"""One optimizer update: micro-batches forward and backward, the reduction, the learning rate, the optimizer."""

from __future__ import annotations

import math
from dataclasses import replace

from pretrain_api.checkpoint.lineage import data_step
from pretrain_trainer.core.progress import Progress
from pretrain_trainer.loop.setup import Run
from pretrain_trainer.models.optimizer import set_learning_rate
from pretrain_trainer.observability.step_timing import StepTimer
from pretrain_trainer.parallelism.forward_backward import MicroBatch
from pretrain_trainer.parallelism.gradients import Reduced, Signals
from pretrain_trainer.parallelism.work_division import largest_share, share
from pretrain_trainer.stability.detector import StepVerdict


def compute_gradients(run: Run, progress: Progress, signals: Signals, pace: StepTimer) -> Reduced:
    """Gradients of the next step, summed over all micro-batches and ranks. Collective."""
    training, place, step = run.training, run.ranks.place, progress.step + 1
    total = training.batch.sequences // training.batch.micro_batch
    mine = share(total, place.replica, place.replicas)
    micro_batches = run.batches.of_step(step, progress.skipped, mine)
    pace.data_read()

    data = data_step(step, progress.skipped)
    numbered_from = (data - 1) * total + mine.start
    passes = largest_share(total, place.replicas) if run.gradients.padded else len(mine)
    work: list[MicroBatch] = []
    for index in range(passes):
        windows, weight = run.batches.filler, 0.0
        if index < len(mine):
            windows, weight = micro_batches[index], 1.0 / run.step_tokens
            if data in run.nan_steps and mine.start + index == 0:
                weight = math.nan  # an injected fault: in one micro-batch, on the rank that has it
        seed = dropout_seed(training.seed, numbered_from + index) if run.dropout else None
        work.append(MicroBatch(windows, weight, seed))
    run.gradients.begin()
    run.passes.accumulate(work, run.gradients)
    pace.computed()
    reduced = run.gradients.reduce(signals, training.optimizer.clip)
    pace.reduced()
    return reduced


def update(run: Run, progress: Progress, verdict: StepVerdict) -> tuple[Progress, float]:
    """(the progress after the update, its learning rate). The update of a verdict that forbids it is dropped."""
    step = progress.step + 1
    rate = run.rates.at(step)
    rate *= math.prod(slowed.factor for slowed in progress.slowed if slowed.first <= step <= slowed.last)
    after = run.guard.stepped(verdict, replace(progress, step=step, tokens=progress.tokens + run.step_tokens))
    if run.guard.answer(verdict) == "update":
        set_learning_rate(run.optimizer, rate)
        run.optimizer.step()
    return after, rate


def dropout_seed(seed: int, micro_batch: int) -> int:
    """The seed of a micro-batch's dropout: by its number in the data, so the same on whichever rank computes it."""
    return seed << 33 ^ micro_batch
