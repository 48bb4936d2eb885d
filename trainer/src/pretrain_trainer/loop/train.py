"""Training, from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from pretrain_api.messages import reports
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_sdk.rank_link import AgentLink
from pretrain_trainer.core.errors import FinalSaveFailed
from pretrain_trainer.core.progress import Progress
from pretrain_trainer.core.ranks import process_group
from pretrain_trainer.evaluation.evaluation import Appraisal
from pretrain_trainer.evaluation.hook import load_hook
from pretrain_trainer.loop.commands import Control
from pretrain_trainer.loop.setup import OpenCheckpointer, Run, prepare
from pretrain_trainer.loop.step import compute_gradients, update
from pretrain_trainer.observability.profiler import Profiling
from pretrain_trainer.observability.step_report import lately, own_part, step_done
from pretrain_trainer.observability.step_timing import StepTimer, marks_on
from pretrain_trainer.parallelism.gradients import Reduced, Signals
from pretrain_trainer.stability.rollback import roll_back

FINAL_ATTEMPTS = 3


def train(
    config: TrainerConfig, link: AgentLink, open_checkpointer: OpenCheckpointer, environ: Mapping[str, str]
) -> None:
    """Train to the last step, going on from the newest checkpoint. Collective; raises the errors of `errors`."""
    with process_group(environ) as ranks:
        hook = load_hook(config.training.evaluation)
        run = prepare(config, link, ranks, open_checkpointer, environ)
        control = Control(link, time.monotonic)
        profiling = Profiling(ranks, link, config.checkpoint.storage, environ)
        pace = StepTimer(run.step_tokens, marks_on(ranks.device))
        appraisal = Appraisal(run, hook)
        progress = run.start

        while progress.step < run.steps:
            pace.begin()
            run.saves.before(progress.step + 1)
            signals = Signals(control.pending(), ranks.first and run.saves.wanted(progress.step + 1))
            reduced = compute_gradients(run, progress, signals, pace)
            verdict = run.guard.look(progress, reduced)
            if run.guard.answer(verdict) == "roll back":
                progress = roll_back(run, progress, verdict)
                continue
            progress, rate = update(run, progress, verdict)
            progress = _report_step(run, progress, reduced, rate, pace)
            profiling.step_done(progress.step)

            run.saves.remember(progress)
            if reduced.signals.save and run.guard.may_save(verdict):
                run.saves.begin(progress)
            elif reduced.signals.save:
                run.saves.put_off()
            if reduced.signals.command:
                _obey(run, control, profiling, progress)
            appraisal.after(progress)
            _report_saves(run)

        profiling.finish(progress.step)
        checkpoint = _settle_last(run, progress)
        appraisal.at_end(progress)
        if ranks.first:
            link.report(reports.Finished(step=progress.step, tokens=progress.tokens, checkpoint=checkpoint))
        run.checkpointer.close()


def _report_step(run: Run, progress: Progress, reduced: Reduced, rate: float, pace: StepTimer) -> Progress:
    """Say that the step is done; the progress with that remembered."""
    times = pace.end(run.saves.take_stall())
    run.utilization.step_done()
    mfu = run.utilization.of_speed(pace.tokens_per_second)
    done = step_done(run.ranks, progress, reduced, rate, times, pace.tokens_per_second, mfu)
    if not run.ranks.first:
        run.link.report(own_part(done))
    elif reduced.finite:  # Else it is said already: its update was dropped.
        run.link.report(done)
    return replace(progress, lately=lately(progress.lately, done)) if reduced.finite else progress


def _report_saves(run: Run) -> None:
    for outcome in run.saves.outcomes():
        run.link.report(outcome)


def _obey(run: Run, control: Control, profiling: Profiling, progress: Progress) -> None:
    """Take a checkpoint of this step and hold at it, or profile the next ones.

    A failed save is reported by rank 0, and training goes on.
    """
    commands = control.agree(run.ranks.world_size)
    for command in commands:
        if command.action == "profile":
            profiling.begin(command, progress.step)
    if not (holding := tuple(command for command in commands if command.action == "checkpoint")):
        return
    checkpoint = run.saves.settle(progress)
    _report_saves(run)
    if checkpoint is not None:
        control.hold(holding, progress.step, checkpoint)


def _settle_last(run: Run, progress: Progress) -> str:
    """The key of the last step's checkpoint, in force. A store that is out of order is waited for.

    Raises FinalSaveFailed, on all ranks.
    """
    for _ in range(FINAL_ATTEMPTS):
        checkpoint = run.saves.settle(progress)
        _report_saves(run)
        if checkpoint is not None:
            return checkpoint
        run.waiting.retry_until_clear(run.checkpointer.look)
    raise FinalSaveFailed(
        f"the checkpoint of the last step ({progress.step}) could not be written in {FINAL_ATTEMPTS} attempts: "
        "see the failed saves reported before this, and check that checkpoint.storage is writable and has space"
    )
