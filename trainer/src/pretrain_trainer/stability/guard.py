"""Response to divergence: the job's `recovery.divergence` applied to the detector's verdicts.

`Rollback` resumes from a checkpoint before the divergence and skips the data around it. `Skip` drops the update of
every abnormal step. `Warn` only reports. An update that is not finite is never made: `Skip` and `Warn` drop it, and
fail when too many consecutive updates are dropped, since nothing is learned any more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pretrain_api.checkpoint.lineage import Rollback, SlowedRange, StepRange, data_step, merged
from pretrain_api.messages import reports
from pretrain_api.spec.job import Divergence
from pretrain_sdk.rank_link import AgentLink
from pretrain_trainer.core.errors import DivergedError
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.parallelism.gradients import Reduced
from pretrain_trainer.stability.detector import StepVerdict, forget_normal, judge

REMEDY = (
    "lower training.optimizer.learningRate, lengthen training.schedule.warmupSteps, or look at the data of these steps"
)
SKIPPED_BEFORE = 4
"""One in SKIPPED_BEFORE skipped steps lies before the spike, whose cause may have been read a little earlier."""

Response = Literal["update", "drop", "roll back"]


@dataclass(frozen=True)
class RollbackRequest:
    """A rollback to perform: its cause, and the settings of what changes."""

    verdict: StepVerdict
    settings: Divergence
    skipped: tuple[StepRange, ...]
    """Ranges of data that are skipped so far."""

    def range_after(self, to_step: int, skipped: Sequence[StepRange]) -> StepRange | None:
        """Return the data to skip after a rollback to `to_step`, whose state was trained with `skipped` skipped.

        These are `skipSteps` steps of data around the start of the spike, none of which that state has seen.
        """
        count = self.settings.skip_steps
        if not count:
            return None
        wanted = data_step(self.verdict.since, self.skipped) - count // SKIPPED_BEFORE
        first = max(wanted, data_step(to_step, skipped) + 1 if to_step else 1)
        return StepRange(first=first, last=first + count - 1)

    def slowed_after(self, to_step: int) -> SlowedRange | None:
        """Return the steps with a lower learning rate: to `skipSteps` steps after the one that detected the spike."""
        if self.settings.learning_rate_factor == 1:
            return None
        last = self.verdict.step + self.settings.skip_steps
        return SlowedRange(first=to_step + 1, last=last, factor=self.settings.learning_rate_factor)


class DivergenceGuard:
    """Judges every step before its update. All ranks decide alike; `reports` is True on rank 0."""

    def __init__(self, settings: Divergence, total_steps: int, link: AgentLink, *, reports: bool) -> None:
        self._settings = settings
        self._total_steps = total_steps
        self._link = link
        self._reports = reports
        self._began: dict[int, float] = {}

    def judge(self, progress: TrainingProgress, reduced: Reduced) -> StepVerdict:
        """Judge the next step by its reduced loss and gradient norm."""
        step, threshold, total = progress.step + 1, self._settings.threshold, self._total_steps
        verdict = judge(progress.watch, step, reduced.loss, reduced.norm, threshold=threshold, total_steps=total)
        if reduced.note:
            verdict = replace(verdict, description=f"{verdict.description}: {reduced.note}")
        now = time.perf_counter()
        outliers = (*verdict.watch.outliers, step)
        self._began = {earlier: began for earlier, began in self._began.items() if earlier in outliers} | {step: now}
        return verdict

    def response(self, verdict: StepVerdict) -> Response:
        """Decide between update, drop and rollback."""
        action = self._settings.action
        if action == "Rollback":
            return "roll back" if verdict.cause else "update"
        if verdict.finding == "not finite" or (action == "Skip" and verdict.finding != "normal"):
            return "drop"
        return "update"

    def may_save(self, verdict: StepVerdict) -> bool:
        """Decide whether to save this step: not while a spike may have begun that would be rolled back."""
        return self._settings.action != "Rollback" or not verdict.uneasy

    def request_rollback(
        self, verdict: StepVerdict, progress: TrainingProgress, earlier: Sequence[Rollback]
    ) -> RollbackRequest:
        """Report a divergence and request its rollback. Raises DivergedError when the allowed rollbacks are used up."""
        self._report(verdict, "Rollback")
        if len(earlier) >= self._settings.max_rollbacks:
            raise DivergedError(self._account(verdict, earlier))
        return RollbackRequest(verdict, self._settings, progress.skipped)

    def record(self, verdict: StepVerdict, progress: TrainingProgress) -> TrainingProgress:
        """Return `progress`, which counts the step, with its verdict recorded. Raises DivergedError."""
        dropped, watch = progress.dropped, verdict.watch
        if self.response(verdict) == "drop":
            dropped = merged((*dropped, StepRange(first=verdict.step, last=verdict.step)))
            self._report(verdict, "Drop")
            most = max(1, self._settings.skip_steps)
            if dropped[-1].last - dropped[-1].first + 1 > most:
                raise DivergedError(
                    f"step {verdict.step}: {verdict.description}; the updates of more than {most} steps in a row were "
                    f"dropped (recovery.divergence.skipSteps): {REMEDY}"
                )
        elif verdict.finding == "spike":
            self._report(verdict, "Warn")
            watch = forget_normal(watch)  # reported once: the new level becomes normal
        if verdict.plateau and self._reports:
            self._link.report(reports.Plateau(step=verdict.step, lowest=watch.lowest or 0.0))
        return replace(progress, dropped=dropped, watch=watch)

    def _report(self, verdict: StepVerdict, action: Literal["Rollback", "Drop", "Warn"]) -> None:
        if not self._reports:
            return
        began = self._began.get(verdict.since)
        self._link.report(
            reports.Diverged(
                step=verdict.step,
                since=verdict.since,
                cause=verdict.cause or "LossSpike",
                action=action,
                seconds=0.0 if began is None else time.perf_counter() - began,
                message=verdict.description,
            )
        )

    def _account(self, verdict: StepVerdict, earlier: Sequence[Rollback]) -> str:
        """Describe the divergence and the earlier rollbacks."""
        text = f"step {verdict.step}: {verdict.description}"
        if not earlier:
            return f"{text}; recovery.divergence.maxRollbacks allows no rollback: {REMEDY}"
        tried = "; ".join(_tried(rollback) for rollback in earlier[-5:])
        allowed = f"{len(earlier)} rollback{'s' * (len(earlier) != 1)} of recovery.divergence.maxRollbacks"
        return f"{text}; the {allowed} did not help ({tried}): {REMEDY}"


def _tried(rollback: Rollback) -> str:
    text = f"{rollback.cause} at step {rollback.step}: rolled back to step {rollback.to_step}"
    if rollback.skipped is not None:
        text += f" without data {rollback.skipped.first} to {rollback.skipped.last}"
    if rollback.slowed is not None:
        text += f", learning rate times {rollback.slowed.factor:g}"
    return text
