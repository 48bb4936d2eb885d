"""Periodic evaluation between two steps: validation losses, the user's own evaluation, and sampled texts.

Neither changes the training state: the model is set back to training mode and random number generators are restored.
"""

from __future__ import annotations

import time

from pretrain_api.messages.reports import Evaluated, Evaluating, Sampled
from pretrain_api.spec.data import Evaluation, Sampling
from pretrain_sdk.rank_link import AgentLink
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.evaluation.held_out import HeldOut, at_rest, evaluate
from pretrain_trainer.evaluation.hook import Hook, HookResult, call_hook
from pretrain_trainer.evaluation.sampling import sample
from pretrain_trainer.evaluation.trained_model import EvaluatedModel


class Evaluator:
    """Evaluates the model every `settings.every` steps and after the last one."""

    def __init__(
        self,
        settings: Evaluation,
        held_out: tuple[HeldOut, ...],
        hook: Hook | None,
        model: EvaluatedModel,
        link: AgentLink,
    ) -> None:
        self._settings = settings
        self._held_out = held_out
        self._hook = hook
        self._model = model
        self._link = link
        self._last_step = -1

    def due(self, step: int, *, last: bool = False) -> bool:
        """Decide whether to evaluate after this step; `last`: no step follows."""
        return self._last_step != step if last else step % self._settings.every == 0

    def evaluate(self, progress: TrainingProgress) -> Evaluated:
        """Return the losses, and the metrics of the user's function on this rank. Collective."""
        self._last_step = progress.step
        began = _begin(progress, self._model, self._link)
        with at_rest(self._model.model):
            losses = evaluate(self._model.passes.loss, self._held_out, self._model.ranks, self._model.padded)
        result = call_hook(self._hook, self._model, progress) if self._hook is not None else HookResult()
        return Evaluated(
            step=progress.step,
            losses=losses,
            metrics=result.metrics,
            problem=result.problem,
            seconds=time.perf_counter() - began,
        )


class Sampler:
    """Samples texts every `settings.every` steps, if set, and after the last one; reports them from rank 0."""

    def __init__(self, settings: Sampling, model: EvaluatedModel, seed: int, link: AgentLink) -> None:
        self._settings = settings
        self._model = model
        self._seed = seed
        self._link = link
        self._last_step = -1

    def due(self, step: int, *, last: bool = False) -> bool:
        """Decide whether to sample after this step; `last`: no step follows."""
        if last:
            return self._last_step != step
        return bool(self._settings.every) and step % (self._settings.every or 1) == 0

    def sample(self, progress: TrainingProgress) -> None:
        """Sample a text for each prompt on the first replica; on all ranks where the model is sharded. Collective."""
        model, self._last_step = self._model, progress.step
        if not (model.ranks.place.replica == 0 or model.padded):
            return
        _begin(progress, model, self._link)
        for number, prompt in enumerate(self._settings.all_prompts):
            with at_rest(model.model):
                text = sample(model.passes, model.tokenizer, prompt, self._settings, model.model.context, self._seed)
            if model.ranks.first:
                self._link.report(Sampled(step=progress.step, number=number, prompt=prompt, text=text))


def _begin(progress: TrainingProgress, model: EvaluatedModel, link: AgentLink) -> float:
    """Report that the next step is delayed; return the time."""
    if model.ranks.first:
        link.report(Evaluating(step=progress.step))
    return time.perf_counter()
