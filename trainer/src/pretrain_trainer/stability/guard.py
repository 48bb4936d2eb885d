"""What a run does about divergence: the job's `recovery.divergence` applied to the detector's verdicts.

`Rollback` goes back to a checkpoint from before it and passes over the data around it. `Skip` drops the update of every
step that is out of the ordinary. `Warn` only says so. Whatever the action, an update that is not finite is never made:
`Skip` and `Warn` drop it, and give up when too many in a row had to be dropped, since nothing is learned any more.
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
from pretrain_trainer.core.progress import Progress
from pretrain_trainer.parallelism.gradients import Reduced
from pretrain_trainer.stability.detector import StepVerdict, anew, look

REMEDY = (
    "lower training.optimizer.learningRate, lengthen training.schedule.warmupSteps, or look at the data of these steps"
)
SKIPPED_BEFORE = 4
"""One in so many of the skipped steps lies before the spike: what caused it may have been read a little earlier."""

Answer = Literal["update", "drop", "roll back"]


@dataclass(frozen=True)
class RollbackRequest:
    """A rollback that is wanted: why, and what is to change."""

    verdict: StepVerdict
    settings: Divergence
    skipped: tuple[StepRange, ...]
    """What is skipped up to now."""

    def range_after(self, to_step: int, skipped: Sequence[StepRange]) -> StepRange | None:
        """The data to pass over from `to_step` on, which has been trained with these ranges skipped: `skipSteps` steps
        of data around the beginning of the spike, none of which that state has seen."""
        count = self.settings.skip_steps
        if not count:
            return None
        wanted = data_step(self.verdict.since, self.skipped) - count // SKIPPED_BEFORE
        first = max(wanted, data_step(to_step, skipped) + 1 if to_step else 1)
        return StepRange(first=first, last=first + count - 1)

    def slowed_after(self, to_step: int) -> SlowedRange | None:
        """The steps with a lower learning rate: until `skipSteps` steps after the one at which it was noticed."""
        if self.settings.learning_rate_factor == 1:
            return None
        last = self.verdict.step + self.settings.skip_steps
        return SlowedRange(first=to_step + 1, last=last, factor=self.settings.learning_rate_factor)


class Guard:
    """Watches every step before its update is made. All ranks decide alike; rank 0 reports."""

    def __init__(self, settings: Divergence, total_steps: int, link: AgentLink, *, speaks: bool) -> None:
        self._settings = settings
        self._total_steps = total_steps
        self._link = link
        self._speaks = speaks
        self._began: dict[int, float] = {}

    def look(self, progress: Progress, reduced: Reduced) -> StepVerdict:
        """The verdict on the next step, whose loss and gradient norm these are."""
        step, threshold, total = progress.step + 1, self._settings.threshold, self._total_steps
        verdict = look(progress.watch, step, reduced.loss, reduced.norm, threshold=threshold, total_steps=total)
        if reduced.note:
            verdict = replace(verdict, said=f"{verdict.said}: {reduced.note}")
        now = time.perf_counter()
        outliers = (*verdict.watch.outliers, step)
        self._began = {earlier: began for earlier, began in self._began.items() if earlier in outliers} | {step: now}
        return verdict

    def answer(self, verdict: StepVerdict) -> Answer:
        """What is to be done with the step."""
        action = self._settings.action
        if action == "Rollback":
            return "roll back" if verdict.cause else "update"
        if verdict.look == "not finite" or (action == "Skip" and verdict.look != "normal"):
            return "drop"
        return "update"

    def may_save(self, verdict: StepVerdict) -> bool:
        """Whether a checkpoint of this step is worth having: not while a spike may have begun that is rolled back."""
        return self._settings.action != "Rollback" or not verdict.uneasy

    def wish(self, verdict: StepVerdict, progress: Progress, earlier: Sequence[Rollback]) -> RollbackRequest:
        """The rollback that is called for, which is said. Raises DivergedError when there were enough of them."""
        self._say(verdict, "Rollback")
        if len(earlier) >= self._settings.max_rollbacks:
            raise DivergedError(self._account(verdict, earlier))
        return RollbackRequest(verdict, self._settings, progress.skipped)

    def stepped(self, verdict: StepVerdict, progress: Progress) -> Progress:
        """`progress`, which counts the step, with what is to be remembered of it. Raises DivergedError."""
        dropped, watch = progress.dropped, verdict.watch
        if self.answer(verdict) == "drop":
            dropped = merged((*dropped, StepRange(first=verdict.step, last=verdict.step)))
            self._say(verdict, "Drop")
            most = max(1, self._settings.skip_steps)
            if dropped[-1].last - dropped[-1].first + 1 > most:
                raise DivergedError(
                    f"step {verdict.step}: {verdict.said}; the updates of more than {most} steps in a row had to be "
                    f"dropped (recovery.divergence.skipSteps): {REMEDY}"
                )
        elif verdict.look == "spike":
            self._say(verdict, "Warn")
            watch = anew(watch)  # said once: what comes now is what is normal
        if verdict.plateau and self._speaks:
            self._link.report(reports.Plateau(step=verdict.step, lowest=watch.lowest or 0.0))
        return replace(progress, dropped=dropped, watch=watch)

    def _say(self, verdict: StepVerdict, action: Literal["Rollback", "Drop", "Warn"]) -> None:
        if not self._speaks:
            return
        began = self._began.get(verdict.since)
        self._link.report(
            reports.Diverged(
                step=verdict.step,
                since=verdict.since,
                cause=verdict.cause or "LossSpike",
                action=action,
                seconds=0.0 if began is None else time.perf_counter() - began,
                message=verdict.said,
            )
        )

    def _account(self, verdict: StepVerdict, earlier: Sequence[Rollback]) -> str:
        """What happened, and what was tried before."""
        text = f"step {verdict.step}: {verdict.said}"
        if not earlier:
            return f"{text}; recovery.divergence.maxRollbacks allows no rollback: {REMEDY}"
        tried = "; ".join(_tried(rollback) for rollback in earlier[-5:])
        allowed = f"{len(earlier)} rollback{'s' * (len(earlier) != 1)} of recovery.divergence.maxRollbacks"
        return f"{text}; the {allowed} did not help ({tried}): {REMEDY}"


def _tried(rollback: Rollback) -> str:
    text = f"{rollback.cause} at step {rollback.step}: back to step {rollback.to_step}"
    if rollback.skipped is not None:
        text += f" without data {rollback.skipped.first} to {rollback.skipped.last}"
    if rollback.slowed is not None:
        text += f", learning rate times {rollback.slowed.factor:g}"
    return text
