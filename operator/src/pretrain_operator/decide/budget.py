"""How often a job may fail: every new checkpoint refunds it, and without one it ends."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from pretrain_api.messages.reports import Failed
from pretrain_api.messages.trainer_config import ExitCode
from pretrain_api.spec import job as spec
from pretrain_api.spec.quantities import format_duration

FIRST_DELAY = 1.0
"""Seconds before the third pod of a slot whose first two never joined; each later one waits twice as long."""
LONGEST_DELAY = 300.0
LONGEST_REFUSAL = 15.0
"""Seconds between two tries where the cluster takes no pods: what is mended goes on so soon."""


@dataclass(frozen=True)
class Spent:
    """What a job has spent of its budget since its last progress."""

    restarts: tuple[float, ...] = ()
    """Unix seconds of every failure that counts."""
    program_failures: int = 0
    """How many of them were failures of the training program itself."""
    last_failure: str = ""

    def failed(self, time: float, message: str, window: timedelta, *, program: bool) -> Spent:
        """One more failure; those from before the window are forgotten."""
        recent = tuple(earlier for earlier in self.restarts if earlier > time - window.total_seconds())
        return Spent((*recent, time), self.program_failures + program, message)

    def blamed_on_program(self) -> Spent:
        """The last failure turned out to be one of the training program."""
        return replace(self, program_failures=self.program_failures + 1)

    def exhausted(self, budget: spec.Budget, now: float) -> str:
        """Why the job must end, or an empty text."""
        recent = sum(time > now - budget.window.total_seconds() for time in self.restarts)
        if recent > budget.restarts:
            return (
                f"{recent} failures within {format_duration(budget.window)} and no new checkpoint; "
                f"recovery.budget.restarts allows {budget.restarts}; last: {self.last_failure}"
            )
        if self.program_failures >= budget.without_progress:
            return (
                f"the training program failed {self.program_failures} times in a row without a new checkpoint, as many "
                f"as recovery.budget.withoutProgress allows; last: {self.last_failure}"
            )
        return ""


def action_on(failure: Failed, rules: Iterable[spec.Rule]) -> str:
    """What the first rule that matches says; `Restart` where none does."""
    return next((rule.action for rule in rules if _matches(rule, failure)), "Restart")


def decisive(failures: Sequence[Failed]) -> tuple[Failed, ...]:
    """The failures that explain the end of a generation: broken collectives only where nothing else was said, since
    they are what the others see of any failure."""
    own = tuple(failure for failure in failures if not is_collective(failure))
    return own or tuple(failures)


def is_collective(failure: Failed) -> bool:
    """A peer went away: a symptom, not a cause."""
    return failure.reason == "CollectiveError" or failure.exit_code == ExitCode.COLLECTIVE


def delay_after(failures: int) -> float:
    """Seconds to wait after so many pods of a slot in a row ended before they joined."""
    if failures <= 1:
        return 0.0
    return min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(failures - 2, 16))


def delay_after_refusals(times: int) -> float:
    """Seconds to wait after the cluster refused a pod so many times in a row."""
    return min(LONGEST_REFUSAL, FIRST_DELAY * 2.0 ** min(times - 1, 16))


def _matches(rule: spec.Rule, failure: Failed) -> bool:
    if rule.on_exit_codes is not None:
        return failure.exit_code in rule.on_exit_codes
    if rule.on_reason is not None:
        return failure.reason == rule.on_reason
    return rule.on_log is not None and re.search(rule.on_log, failure.message) is not None
