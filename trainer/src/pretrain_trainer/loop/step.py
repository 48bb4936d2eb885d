"""One optimizer update: micro-batches forward and backward, the reduction, the learning rate, the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch.optim import Optimizer

from pretrain_api.checkpoint.lineage import data_step
from pretrain_api.spec.schedule import LearningRates
from pretrain_api.spec.training import Training
from pretrain_trainer.core.mesh import MeshPosition
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.datasets.corpus import Batches
from pretrain_trainer.datasets.prefetch import FetchedBatches
from pretrain_trainer.models.optimizer import set_learning_rate
from pretrain_trainer.observability.step_timing import StepTimer
from pretrain_trainer.parallelism.forward_backward import MicroBatch, Passes, largest_share, share
from pretrain_trainer.parallelism.gradients import Gradients, Reduced, Signals
from pretrain_trainer.stability.detector import StepVerdict
from pretrain_trainer.stability.guard import DivergenceGuard


@dataclass(frozen=True)
class OptimizerStep:
    """The parts of a run that compute an update on this rank."""

    training: Training
    step_tokens: int
    """Tokens of a step over all ranks."""
    place: MeshPosition
    batches: Batches | FetchedBatches
    passes: Passes
    gradients: Gradients
    optimizer: Optimizer
    rates: LearningRates
    dropout: bool
    nan_steps: frozenset[int]
    """Data steps with an injected fault: one micro-batch has a weight of NaN."""

    def compute_gradients(self, progress: TrainingProgress, signals: Signals, timer: StepTimer) -> Reduced:
        """Compute the next step's gradients, summed over all micro-batches and ranks. Collective."""
        total = self.training.batch.sequences // self.training.batch.micro_batch
        mine = share(total, self.place.replica, self.place.replicas)
        micro_batches = self.batches.of_step(progress.step + 1, progress.skipped, mine)
        timer.data_read()
        data = data_step(progress.step + 1, progress.skipped)
        numbered_from = (data - 1) * total + mine.start
        passes = largest_share(total, self.place.replicas) if self.gradients.padded else len(mine)
        work: list[MicroBatch] = []
        for index in range(passes):
            windows, weight = self.batches.filler, 0.0
            if index < len(mine):
                windows, weight = micro_batches[index], 1.0 / self.step_tokens
                if data in self.nan_steps and mine.start + index == 0:
                    weight = math.nan
            seed = dropout_seed(self.training.seed, numbered_from + index) if self.dropout else None
            work.append(MicroBatch(windows, weight, seed))
        self.gradients.begin()
        self.passes.accumulate(work, self.gradients)
        timer.computed()
        reduced = self.gradients.reduce(signals, self.training.optimizer.clip)
        timer.reduced()
        return reduced

    def learning_rate(self, progress: TrainingProgress) -> float:
        """Return the rate of the next step, lowered within `progress.slowed`."""
        step = progress.step + 1
        slowed = (one.factor for one in progress.slowed if one.first <= step <= one.last)
        return self.rates.at(step) * math.prod(slowed)

    def update(
        self, guard: DivergenceGuard, progress: TrainingProgress, verdict: StepVerdict
    ) -> tuple[TrainingProgress, float]:
        """Return the progress after the update, and its learning rate. Drops the update where the verdict says so."""
        rate = self.learning_rate(progress)
        counted = replace(progress, step=progress.step + 1, tokens=progress.tokens + self.step_tokens)
        after = guard.record(verdict, counted)
        if guard.response(verdict) == "update":
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
        return after, rate


def dropout_seed(seed: int, micro_batch: int) -> int:
    """Return the seed of a micro-batch's dropout: by its number in the data, so equal on whichever rank runs it."""
    return seed << 33 ^ micro_batch
