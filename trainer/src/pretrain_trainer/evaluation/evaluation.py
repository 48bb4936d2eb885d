"""What is found out about the model between two steps: validation losses, the user's own evaluation, what it writes."""

from __future__ import annotations

import time

from pretrain_api.messages import reports
from pretrain_trainer.core.progress import Progress
from pretrain_trainer.evaluation.held_out import at_rest, evaluate
from pretrain_trainer.evaluation.hook import Answer, Hook, call_hook
from pretrain_trainer.evaluation.sampling import sample
from pretrain_trainer.loop.setup import Run


class Appraisal:
    """Evaluates and samples, each at its interval and at the end. It leaves no trace in what is trained."""

    def __init__(self, run: Run, hook: Hook | None) -> None:
        self._run = run
        self._hook = hook
        self._evaluated = self._sampled = -1
        """The steps after which that was done last."""

    def after(self, progress: Progress) -> None:
        """Whatever is due after this step. Collective."""
        evaluation, sampling = self._run.training.evaluation, self._run.training.sampling
        if evaluation and progress.step % evaluation.every == 0:
            self._evaluate(progress)
        if sampling and sampling.every and progress.step % sampling.every == 0:
            self._sample(progress)

    def at_end(self, progress: Progress) -> None:
        """All of it after the last step, unless that was done. Collective."""
        if self._run.training.evaluation and self._evaluated != progress.step:
            self._evaluate(progress)
        if self._run.training.sampling and self._sampled != progress.step:
            self._sample(progress)

    def _evaluate(self, progress: Progress) -> None:
        run, self._evaluated = self._run, progress.step
        began = self._begin(progress)
        with at_rest(run.model):
            losses = evaluate(run.passes.loss, run.held_out, run.ranks, run.gradients.padded)
        answer = call_hook(self._hook, run, progress) if self._hook is not None else Answer()
        if run.ranks.first:
            seconds = time.perf_counter() - began
            run.link.report(
                reports.Evaluated(
                    step=progress.step, losses=losses, metrics=answer.metrics, problem=answer.problem, seconds=seconds
                )
            )

    def _sample(self, progress: Progress) -> None:
        """One replica writes; a sharded model needs all ranks for it, which write the same."""
        run, sampling, self._sampled = self._run, self._run.training.sampling, progress.step
        assert sampling is not None
        if not (run.ranks.place.replica == 0 or run.gradients.padded):
            return
        self._begin(progress)
        for number, prompt in enumerate(sampling.beginnings):
            with at_rest(run.model):
                text = sample(run.passes, run.tokenizer, prompt, sampling, run.model.context, run.training.seed)
            if run.ranks.first:
                run.link.report(reports.Sampled(step=progress.step, number=number, prompt=prompt, text=text))

    def _begin(self, progress: Progress) -> float:
        """Say that no step comes for a while; the time of it."""
        if self._run.ranks.first:
            self._run.link.report(reports.Evaluating(step=progress.step))
        return time.perf_counter()
