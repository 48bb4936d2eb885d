"""Back to a state from before the loss diverged, in the processes that run: collective, between two steps."""

from __future__ import annotations

import time

from pretrain_api.checkpoint.lineage import manifest_key
from pretrain_api.messages.reports import RolledBack
from pretrain_trainer.core.progress import Progress
from pretrain_trainer.loop.setup import Run
from pretrain_trainer.stability.detector import StepVerdict


def roll_back(run: Run, progress: Progress, verdict: StepVerdict) -> Progress:
    """Take a number above this generation's, load what its record names, and say so; the progress to go on from.

    Raises Diverged when there were enough rollbacks, NumberTakenError and SupersededError when somebody else goes on,
    CheckpointRejectedError when what it goes back to is damaged: then a new generation goes on from an earlier one.
    """
    began = time.perf_counter()
    checkpointer = run.checkpointer
    wish = run.guard.wish(verdict, progress, checkpointer.rollbacks)
    run.waiting.retry_until_clear(lambda: checkpointer.go_back(wish))
    for outcome in run.saves.outcomes():
        run.link.report(outcome)
    start = run.waiting.retry_until_clear(lambda: checkpointer.restore(run.model, run.optimizer))
    if checkpointer.parent is None and not checkpointer.recalled:
        run.begin_anew()
    run.saves.go_back()
    rollbacks, parent = checkpointer.rollbacks, checkpointer.parent
    run.link.report(
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
