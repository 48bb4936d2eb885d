"""Rollback to a state from before the loss diverged, in the running processes, between two steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from pretrain_api.checkpoint.lineage import manifest_key
from pretrain_api.messages.reports import RolledBack, Saved, SaveFailed
from pretrain_sdk.rank_link import AgentLink
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.waits import ObstacleRetry
from pretrain_trainer.loop.step_saves import CheckpointerPort, StepSaves
from pretrain_trainer.stability.guard import RollbackRequest


@dataclass(frozen=True)
class InPlaceRollback:
    """The parts of a run that a rollback changes, and where it reports."""

    checkpointer: CheckpointerPort
    saves: StepSaves
    model: nn.Module
    optimizer: Optimizer
    reinitialise: Callable[[], None]
    """Sets model and optimizer to their state before the first step. Collective."""
    retry: ObstacleRetry
    link: AgentLink

    def perform(
        self, request: RollbackRequest, on_checkpoint: Callable[[Saved | SaveFailed], None]
    ) -> TrainingProgress:
        """Take the next generation number, load the parent of its record and report it; return the progress.

        Collective. Raises NumberTakenError and SupersededError when another generation resumes, and
        CheckpointRejectedError when the parent is damaged: then a new generation resumes from an older checkpoint.
        """
        began = time.perf_counter()
        checkpointer = self.checkpointer
        self.retry.retry_until_clear(lambda: checkpointer.go_back(request))
        for outcome in self.saves.outcomes():
            on_checkpoint(outcome)
        start = self.retry.retry_until_clear(lambda: checkpointer.restore(self.model, self.optimizer))
        if checkpointer.parent is None and not checkpointer.recalled:
            self.reinitialise()
        self.saves.restart()
        rollbacks, parent = checkpointer.rollbacks, checkpointer.parent
        self.link.report(
            RolledBack(
                number=rollbacks[-1].generation,
                rollback=rollbacks[-1],
                checkpoint=manifest_key(parent.generation, parent.step) if parent else None,
                tokens=start.tokens,
                skipped=start.skipped,
                count=len(rollbacks),
                seconds=time.perf_counter() - began,
            )
        )
        return start
