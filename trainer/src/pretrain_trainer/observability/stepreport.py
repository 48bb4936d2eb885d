"""What a rank says of a step: rank 0 of the whole job, the others of themselves."""

from __future__ import annotations

from pretrain_api.reports import Progress as ProgressReport
from pretrain_api.reports import StepDone
from pretrain_trainer.observability.memory import accelerator_memory, process_memory
from pretrain_trainer.observability.timing import StepTimes
from pretrain_trainer.parallelism.gradients import Reduced
from pretrain_trainer.progress import Progress
from pretrain_trainer.ranks import Ranks

DIGITS = 6
"""Of seconds, to keep reports small."""


def step_report(
    ranks: Ranks,
    progress: Progress,
    reduced: Reduced,
    rate: float,
    times: StepTimes,
    tokens_per_second: float,
    mfu: float | None,
) -> StepDone | ProgressReport:
    """The report of the step that `progress` has come to."""
    memory = accelerator_memory(ranks.device)
    if not ranks.first:
        return ProgressReport(
            step=progress.step,
            seconds=round(times.seconds, DIGITS),
            data_seconds=round(times.data, DIGITS),
            compute_seconds=round(times.compute, DIGITS),
            reduce_seconds=round(times.reduce, DIGITS),
            optimizer_seconds=round(times.optimizer, DIGITS),
            stall_seconds=round(times.stall, DIGITS),
            loss_contribution=reduced.contribution if reduced.finite else None,
            memory=memory,
        )
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
        memory=memory or process_memory(),
    )
