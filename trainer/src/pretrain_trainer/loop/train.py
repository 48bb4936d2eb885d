"""The training loop, from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from pretrain_api.messages.reports import Finished
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_api.spec.training import Training
from pretrain_sdk.rank_link import AgentLink
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.errors import FinalSaveFailed
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.ranks import process_group
from pretrain_trainer.evaluation.evaluation import Evaluator, Sampler
from pretrain_trainer.evaluation.hook import Hook, load_hook
from pretrain_trainer.loop.builtin_callbacks import (
    EvaluationCallback,
    ProfilingCallback,
    ReportCallback,
    SamplingCallback,
)
from pretrain_trainer.loop.callbacks import Callback, Callbacks, CompletedStep
from pretrain_trainer.loop.commands import StepCommands
from pretrain_trainer.loop.setup import OpenCheckpointer, PreparedRun, prepare
from pretrain_trainer.observability.profiler import Profiler
from pretrain_trainer.observability.step_report import lately
from pretrain_trainer.parallelism.gradients import Reduced, Signals

FINAL_ATTEMPTS = 3

MakeCallbacks = Callable[[PreparedRun], Sequence[Callback]]
"""Creates the callbacks of one rank from the parts of its run, on all ranks alike."""


def no_callbacks(run: PreparedRun) -> Sequence[Callback]:
    """Add no callback to the trainer's own."""
    return ()


def train(
    config: TrainerConfig,
    link: AgentLink,
    open_checkpointer: OpenCheckpointer,
    environment: Environment,
    make_callbacks: MakeCallbacks = no_callbacks,
) -> None:
    """Train to the last step, resuming from the latest checkpoint. Collective; raises the errors of `core.errors`."""
    with process_group(environment) as ranks:
        hook = load_hook(config.training.evaluation)
        run = prepare(config, link, ranks, open_checkpointer, environment)
        profiler = Profiler(run.ranks, link, config.checkpoint.storage, environment)
        callbacks = _callbacks(run, config.training, link, hook, profiler, make_callbacks)
        commands = StepCommands(link, time.monotonic)
        progress = run.start

        while progress.step < run.total_steps:
            callbacks.before_step(progress.step + 1)
            run.timer.begin()
            run.saves.before_step(progress.step + 1)
            signals = Signals(commands.pending(), ranks.first and run.saves.due(progress.step + 1))
            reduced = run.step.compute_gradients(progress, signals, run.timer)
            verdict = run.guard.judge(progress, reduced)
            if run.guard.response(verdict) == "roll back":
                request = run.guard.request_rollback(verdict, progress, run.checkpointer.rollbacks)
                progress = run.rollback.perform(request, callbacks.on_checkpoint)
                continue
            progress, rate = run.step.update(run.guard, progress, verdict)
            completed = _complete(run, progress, reduced, rate)
            progress = completed.progress
            callbacks.after_step(completed, collective=False)

            run.saves.after_step(progress, due=reduced.signals.save, sound=run.guard.may_save(verdict))
            if reduced.signals.command:
                _obey(run, commands, profiler, callbacks, progress)
            callbacks.after_step(completed, collective=True)
            _announce_saves(run, callbacks)

        checkpoint = _commit_last(run, callbacks, progress)
        callbacks.on_end(progress)
        if ranks.first:
            link.report(Finished(step=progress.step, tokens=progress.tokens, checkpoint=checkpoint))
        run.checkpointer.close()


def _callbacks(
    run: PreparedRun,
    training: Training,
    link: AgentLink,
    hook: Hook | None,
    profiler: Profiler,
    make_callbacks: MakeCallbacks,
) -> Callbacks:
    """Register the trainer's own callbacks, then those of the caller."""
    callbacks = Callbacks([ReportCallback(link, first=run.ranks.first), ProfilingCallback(profiler)])
    if training.evaluation is not None:
        evaluator = Evaluator(training.evaluation, run.held_out, hook, run.evaluated, link)
        callbacks.add(EvaluationCallback(evaluator, callbacks.on_evaluation))
    if training.sampling is not None:
        callbacks.add(SamplingCallback(Sampler(training.sampling, run.evaluated, training.seed, link)))
    for callback in make_callbacks(run):
        callbacks.add(callback)
    return callbacks


def _complete(run: PreparedRun, progress: TrainingProgress, reduced: Reduced, rate: float) -> CompletedStep:
    """Measure the step, and keep its report in the progress unless its update was dropped for a value not finite."""
    report = run.recorder.record(progress, reduced, rate, run.saves.take_stall())
    if reduced.finite:
        progress = replace(progress, lately=lately(progress.lately, report))
    return CompletedStep(progress, report, reduced.finite, last=progress.step >= run.total_steps)


def _announce_saves(run: PreparedRun, callbacks: Callbacks) -> None:
    for outcome in run.saves.outcomes():
        callbacks.on_checkpoint(outcome)


def _obey(
    run: PreparedRun, commands: StepCommands, profiler: Profiler, callbacks: Callbacks, progress: TrainingProgress
) -> None:
    """Carry out the ranks' commands: profile the next steps, or commit a checkpoint of this step and hold.

    A failed save is reported by rank 0, and training continues.
    """
    agreed = commands.agree(run.ranks.world_size)
    for command in agreed:
        if command.action == "profile":
            profiler.begin(command, progress.step)
    if not (holding := tuple(command for command in agreed if command.action == "checkpoint")):
        return
    checkpoint = run.saves.commit(progress)
    _announce_saves(run, callbacks)
    if checkpoint is not None:
        commands.hold(holding, progress.step, checkpoint)


def _commit_last(run: PreparedRun, callbacks: Callbacks, progress: TrainingProgress) -> str:
    """Return the manifest key of the last step's checkpoint, waiting for a store that is unavailable.

    Raises FinalSaveFailed on all ranks.
    """
    for _ in range(FINAL_ATTEMPTS):
        checkpoint = run.saves.commit(progress)
        _announce_saves(run, callbacks)
        if checkpoint is not None:
            return checkpoint
        run.retry.retry_until_clear(run.checkpointer.look)
    raise FinalSaveFailed(
        f"the checkpoint of the last step ({progress.step}) could not be written in {FINAL_ATTEMPTS} attempts: "
        "see the failed saves reported before this, and check that checkpoint.storage is writable and has space"
    )
