"""The failure budget: a new checkpoint restores it, and a job without one fails when it is spent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from pretrain_api.messages.reports import Failed
from pretrain_api.messages.trainer_config import ExitCode
from pretrain_api.spec import job as spec
from pretrain_api.spec.quantities import format_duration


@dataclass(frozen=True)
class Spent:
    """The part of the budget spent since the last progress."""

    restarts: tuple[float, ...] = ()
    """Unix seconds of each counted failure."""
    program_failures: int = 0
    """Number of these that the training program itself caused."""
    last_failure: str = ""

    def failed(self, time: float, message: str, window: timedelta, *, program: bool) -> Spent:
        """Add a failure and drop those before the window."""
        recent = tuple(earlier for earlier in self.restarts if earlier > time - window.total_seconds())
        return Spent((*recent, time), self.program_failures + program, message)

    def blamed_on_program(self) -> Spent:
        """Attribute the last failure to the training program after all."""
        return replace(self, program_failures=self.program_failures + 1)

    def exhausted(self, budget: spec.Budget, now: float) -> str:
        """Return why the job must end, or an empty text."""
        recent = sum(time > now - budget.window.total_seconds() for time in self.restarts)
        if recent > budget.restarts:
            return (
                f"{recent} failures within {format_duration(budget.window)} and no new checkpoint; "
                f"recovery.budget.restarts allows {budget.restarts}; last: {self.last_failure}"
            )
        if self.program_failures >= budget.without_progress:
            return (
                f"the training program failed {self.program_failures} times in a row without a new checkpoint, "
                f"the limit of recovery.budget.withoutProgress; last: {self.last_failure}"
            )
        return ""


def action_on(failure: Failed, rules: Iterable[spec.Rule]) -> str:
    """Return the action of the first matching rule; `Restart` without a match."""
    return next((rule.action for rule in rules if _matches(rule, failure)), "Restart")


def decisive(failures: Sequence[Failed]) -> tuple[Failed, ...]:
    """Return the failures that explain the end of a generation.

    Failed collectives count only without any other failure: every failure causes them on the other ranks.
    """
    own = tuple(failure for failure in failures if not is_collective(failure))
    return own or tuple(failures)


def is_collective(failure: Failed) -> bool:
    """Return whether a peer was lost: a symptom, not a cause."""
    return failure.reason == "CollectiveError" or failure.exit_code == ExitCode.COLLECTIVE


def _matches(rule: spec.Rule, failure: Failed) -> bool:
    if rule.on_exit_codes is not None:
        return failure.exit_code in rule.on_exit_codes
    if rule.on_reason is not None:
        return failure.reason == rule.on_reason
    return rule.on_log is not None and re.search(rule.on_log, failure.message) is not None
