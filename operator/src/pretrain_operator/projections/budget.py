"""Projection of the failure budget: every new checkpoint refunds it, and a job that spent it ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from pretrain_api.messages.protocol import Generation
from pretrain_api.messages.reports import CheckpointRejected, Failed, Finished, Held, Saved
from pretrain_api.messages.trainer_config import ExitCode
from pretrain_api.spec import job as spec
from pretrain_api.spec.patterns import compile_pattern
from pretrain_api.spec.quantities import format_duration
from pretrain_api.status.job import JobStatus
from pretrain_operator.cluster import Event
from pretrain_operator.facts.fact import GenerationAnnounced, GenerationEnded, StartsFailed
from pretrain_operator.projections.goodput import STEPPING
from pretrain_operator.projections.projection import NO_EFFECTS, Context, Effects, Projection, on

PROGRAM_CAUSES = ("RankFailed", "Hang", "CheckpointRejected")


@dataclass(frozen=True)
class Spent:
    """Failures that count against the budget since the last progress."""

    restarts: tuple[float, ...] = ()
    """Unix seconds of each."""
    program_failures: int = 0
    """Number of failures of the training program itself among them."""
    last_failure: str = ""

    def failed(self, time: float, message: str, window: timedelta, *, program: bool) -> Spent:
        """Add a failure and drop those from before the window."""
        recent = tuple(earlier for earlier in self.restarts if earlier > time - window.total_seconds())
        return Spent((*recent, time), self.program_failures + program, message)

    def blamed_on_program(self) -> Spent:
        """Attribute the last failure to the training program."""
        return replace(self, program_failures=self.program_failures + 1)

    def exhausted(self, budget: spec.Budget, now: float) -> str:
        """Return the reason for which the job must end; empty while the budget lasts."""
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


NOTHING_SPENT = Spent()


@dataclass(frozen=True)
class BudgetSlice:
    """Slice of the status: failures against the budget. Each counts when its generation ends."""

    spent: Spent = NOTHING_SPENT
    fatal: str = ""
    """Reason for which a rule of the job ends the job; empty: none does."""
    failures: tuple[Failed, ...] = ()
    """Ranks of the current generation that failed."""
    unexplained: Generation | None = None
    """Generation that ended with collective errors only: its successor shows whether a worker was lost."""
    falls_back: bool = False
    """The current generation rejected a checkpoint that no earlier one rejected."""


Folded = tuple[BudgetSlice, Effects]


def restore(status: JobStatus) -> BudgetSlice:
    """Read the slice."""
    books = status.bookkeeping
    return BudgetSlice(Spent(books.restarts, books.program_failures, books.last_failure))


def write(slice_: BudgetSlice, status: JobStatus) -> JobStatus:
    """Return the status with the slice in it."""
    spent = slice_.spent
    books = {
        "restarts": spent.restarts,
        "program_failures": spent.program_failures,
        "last_failure": spent.last_failure,
    }
    return status.model_copy(update={"bookkeeping": status.bookkeeping.model_copy(update=books)})


def announced(slice_: BudgetSlice, fact: GenerationAnnounced, _: Context) -> Folded:
    """Begin the next generation. If no worker of an unexplained one is missing, the program failed."""
    spent, unexplained = slice_.spent, slice_.unexplained
    if unexplained is not None and _agents(unexplained) <= _agents(fact.generation):
        spent = spent.blamed_on_program()
    return BudgetSlice(spent, slice_.fatal), NO_EFFECTS


def ended(slice_: BudgetSlice, fact: GenerationEnded, context: Context) -> Folded:
    """Count a fault, unless the job's rules ignore it.

    The first rejection of a checkpoint is free: the next generation resumes from another one, and their number is
    finite.
    """
    if fact.intended or context.state == "suspended" or (fact.cause == "CheckpointRejected" and slice_.falls_back):
        return slice_, NO_EFFECTS
    causes, rules = decisive(slice_.failures), context.recovery.rules
    if causes and all(action_on(failure, rules) == "Ignore" for failure in causes):
        return slice_, NO_EFFECTS
    program, unexplained = fact.cause in PROGRAM_CAUSES, slice_.unexplained
    if fact.cause == "RankFailed" and causes and all(map(is_collective, causes)):
        program, unexplained = False, context.membership.current
    message = fact.message or (causes[0].message if causes else "")
    text = f"{fact.cause}: {message}" if message else fact.cause
    spent = slice_.spent.failed(fact.time, text, context.recovery.budget.window, program=program)
    return replace(slice_, spent=spent, unexplained=unexplained), NO_EFFECTS


def failed(slice_: BudgetSlice, body: Failed, context: Context) -> Folded:
    """Note a rank that failed. A rule of the job may end the job for it."""
    fatal = slice_.fatal
    if action_on(body, context.recovery.rules) == "Fail":
        fatal = f"rank {body.rank} failed with exit code {body.exit_code} ({body.reason}): {body.message}"
    return replace(slice_, fatal=fatal, failures=(*slice_.failures, body)), NO_EFFECTS


def checkpoint_rejected(slice_: BudgetSlice, _: CheckpointRejected, __: Context) -> Folded:
    """Note that the next generation resumes from another checkpoint."""
    return replace(slice_, falls_back=True), NO_EFFECTS


def starts_failed(slice_: BudgetSlice, fact: StartsFailed, context: Context) -> Folded:
    """Count pods that ended before they joined. While steps complete a replacement that cannot start costs nothing."""
    effects = Effects(events=(Event("Warning", "WorkerFailed", fact.message),))
    if context.state in STEPPING:
        return slice_, effects
    spent = slice_.spent
    for _ in range(fact.count):
        spent = spent.failed(fact.time, fact.message, context.recovery.budget.window, program=False)
    return replace(slice_, spent=spent), effects


def checkpoint_committed(slice_: BudgetSlice, body: Saved | Held | Finished, context: Context) -> Folded:
    """Refund the budget if the checkpoint is of a later step than any before."""
    return replace(slice_, spent=NOTHING_SPENT) if body.step > context.checkpoint_step else slice_, NO_EFFECTS


def action_on(failure: Failed, rules: Iterable[spec.Rule]) -> str:
    """Return the action of the first rule that matches; `Restart` if none does."""
    return next((rule.action for rule in rules if _matches(rule, failure)), "Restart")


def decisive(failures: Sequence[Failed]) -> tuple[Failed, ...]:
    """Select the failures that explain the end of a generation.

    Collective errors count only if there is nothing else: the other ranks report them after any failure.
    """
    own = tuple(failure for failure in failures if not is_collective(failure))
    return own or tuple(failures)


def is_collective(failure: Failed) -> bool:
    """Recognise a collective error: a peer disappeared, which is a symptom and no cause."""
    return failure.reason == "CollectiveError" or failure.exit_code == ExitCode.COLLECTIVE


def _matches(rule: spec.Rule, failure: Failed) -> bool:
    if rule.on_exit_codes is not None:
        return failure.exit_code in rule.on_exit_codes
    if rule.on_reason is not None:
        return failure.reason == rule.on_reason
    return rule.on_log is not None and compile_pattern(rule.on_log).found_in(failure.message)


def _agents(generation: Generation) -> frozenset[str]:
    return frozenset(member.agent_id for member in generation.members)


BUDGET = Projection(
    name="budget",
    restore=restore,
    write=write,
    rules=(
        on(GenerationAnnounced, announced),
        on(GenerationEnded, ended),
        on(Failed, failed),
        on(CheckpointRejected, checkpoint_rejected),
        on(StartsFailed, starts_failed),
        on(Saved, checkpoint_committed),
        on(Held, checkpoint_committed),
        on(Finished, checkpoint_committed),
    ),
)
