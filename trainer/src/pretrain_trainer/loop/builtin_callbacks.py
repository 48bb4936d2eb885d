"""The trainer's own callbacks: reports, profiling, evaluation and sampling."""

from __future__ import annotations

from collections.abc import Callable

from pretrain_api.messages.reports import Evaluated, Saved, SaveFailed
from pretrain_sdk.rank_link import AgentLink
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.evaluation.evaluation import Evaluator, Sampler
from pretrain_trainer.loop.callbacks import Callback, CompletedStep
from pretrain_trainer.observability.profiler import Profiler
from pretrain_trainer.observability.step_report import own_part


class ReportCallback(Callback):
    """Reports steps, saves and evaluations to the agent: rank 0 for the job, the others their own part of a step."""

    def __init__(self, link: AgentLink, *, first: bool) -> None:
        self._link = link
        self._first = first

    def after_step(self, completed: CompletedStep) -> None:
        """Report the step; a dropped update was reported by the divergence guard."""
        if not self._first:
            self._link.report(own_part(completed.report))
        elif completed.finite:
            self._link.report(completed.report)

    def on_checkpoint(self, outcome: Saved | SaveFailed) -> None:
        """Report a save."""
        self._link.report(outcome)

    def on_evaluation(self, evaluated: Evaluated) -> None:
        """Report an evaluation from rank 0."""
        if self._first:
            self._link.report(evaluated)


class ProfilingCallback(Callback):
    """Advances the profiler, which records the steps that a command asks for."""

    def __init__(self, profiler: Profiler) -> None:
        self._profiler = profiler

    def after_step(self, completed: CompletedStep) -> None:
        """End the step in the trace."""
        self._profiler.step_done(completed.progress.step, last=completed.last)

    def on_end(self, progress: TrainingProgress) -> None:
        """Wait until the trace is written."""
        self._profiler.finish()


class EvaluationCallback(Callback):
    """Evaluates at the interval and at the end, and announces the result to all callbacks."""

    collective = True

    def __init__(self, evaluator: Evaluator, announce: Callable[[Evaluated], None]) -> None:
        self._evaluator = evaluator
        self._announce = announce

    def after_step(self, completed: CompletedStep) -> None:
        """Evaluate if it is due."""
        if self._evaluator.due(completed.progress.step):
            self._announce(self._evaluator.evaluate(completed.progress))

    def on_end(self, progress: TrainingProgress) -> None:
        """Evaluate unless the last step was evaluated."""
        if self._evaluator.due(progress.step, last=True):
            self._announce(self._evaluator.evaluate(progress))


class SamplingCallback(Callback):
    """Samples texts at the interval and at the end."""

    collective = True

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def after_step(self, completed: CompletedStep) -> None:
        """Sample if it is due."""
        if self._sampler.due(completed.progress.step):
            self._sampler.sample(completed.progress)

    def on_end(self, progress: TrainingProgress) -> None:
        """Sample unless the last step was sampled."""
        if self._sampler.due(progress.step, last=True):
            self._sampler.sample(progress)
