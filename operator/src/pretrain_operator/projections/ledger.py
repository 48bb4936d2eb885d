"""The status as a composition of projections: each fact is admitted once and dispatched through one table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from pretrain_api.spec.job import Recovery
from pretrain_api.status.job import GoodputState, JobStatus, Obstacle, Suspect
from pretrain_operator.facts.fact import Fact, Reported
from pretrain_operator.facts.log import AdmittedFact, FactLog
from pretrain_operator.projections.budget import BUDGET, NOTHING_SPENT, Spent
from pretrain_operator.projections.checkpoints import CHECKPOINTS
from pretrain_operator.projections.evaluations import EVALUATIONS
from pretrain_operator.projections.generations import GENERATIONS
from pretrain_operator.projections.goodput import GOODPUT
from pretrain_operator.projections.incidents import INCIDENTS
from pretrain_operator.projections.obstacle import OBSTACLE
from pretrain_operator.projections.profiles import PROFILES
from pretrain_operator.projections.progress import PROGRESS
from pretrain_operator.projections.projection import NO_EFFECTS, Context, Effects, Projection
from pretrain_operator.projections.suspects import SUSPECTS

PROJECTIONS: tuple[Projection[Any], ...] = (
    GENERATIONS, PROGRESS, GOODPUT, INCIDENTS, BUDGET, SUSPECTS, CHECKPOINTS, EVALUATIONS, PROFILES, OBSTACLE,
)  # fmt: skip

Slice = TypeVar("Slice")


@dataclass(frozen=True)
class Projected:
    """The part of the projections that decisions read."""

    state: GoodputState = "queued"
    recovering: str = ""
    """Cause of the newest open incident; empty: none is open."""
    spent: Spent = NOTHING_SPENT
    fatal: str = ""
    """Reason for which a rule of the job ends the job; empty: none does."""
    suspects: tuple[Suspect, ...] = ()
    ranks_wait: Obstacle | None = None
    """Obstacle that the ranks of the current generation wait for."""
    grace_seconds: float = 30.0
    """Time that a worker needs to end with a checkpoint."""
    stepped_at: float | None = None
    """Unix seconds of the last step that this process knows of."""
    answered_profiles: frozenset[str] = frozenset()
    """Requests for a profile that have an answer."""


class Ledger:
    """Slices of the status, and the log that admits facts to them; pure book-keeping without clock and I/O.

    A ledger continues from the status as last written. Nothing is counted while no operator runs: the reports that
    agents replay afterwards carry their own times, so the outage is accounted for by them. Facts taken in less than a
    status interval before a crash may be missing.
    """

    def __init__(self, status: JobStatus, projections: tuple[Projection[Any], ...] = PROJECTIONS) -> None:
        self._status = status
        self._log = FactLog(status)
        self._projections = projections
        self._slices: dict[str, Any] = {projection.name: projection.restore(status) for projection in projections}
        self._table = _table(projections)

    def record(self, fact: Fact, recovery: Recovery) -> Effects:
        """Admit a fact and fold it into every slice that it concerns."""
        entry = self._log.admit(fact)
        if entry is None:
            return NO_EFFECTS
        what = fact.body if isinstance(fact, Reported) else fact
        folds = self._table.get(type(what), ())
        if not folds:
            return NO_EFFECTS
        context, effects = self._context(entry, recovery), NO_EFFECTS
        changed: dict[str, Any] = {}
        for name, fold in folds:
            changed[name], more = fold(self._slices[name], what, context)
            effects += more
        self._slices |= changed
        return effects

    def slice(self, projection: Projection[Slice]) -> Slice:
        """Return the slice of a projection."""
        return cast("Slice", self._slices[projection.name])

    def status(self) -> JobStatus:
        """Return the first status with the present slices in it."""
        status = self._status
        for projection in self._projections:
            status = projection.write(self._slices[projection.name], status)
        return status

    def view(self) -> Projected:
        """Return what decisions depend on."""
        budget = self.slice(BUDGET)
        return Projected(
            state=self.slice(GOODPUT).state,
            recovering=self.slice(INCIDENTS).recovering,
            spent=budget.spent,
            fatal=budget.fatal,
            suspects=self.slice(SUSPECTS).suspects,
            ranks_wait=self.slice(OBSTACLE).ranks_wait,
            grace_seconds=self.slice(CHECKPOINTS).grace_seconds,
            stepped_at=self.slice(PROGRESS).pace.stepped_at,
            answered_profiles=self._log.position.profiles,
        )

    def _context(self, entry: AdmittedFact, recovery: Recovery) -> Context:
        fact, progress = entry.fact, self.slice(PROGRESS)
        return Context(
            time=fact.time,
            recovery=recovery,
            before=entry.before,
            position=entry.after,
            membership=self.slice(GENERATIONS),
            state=self.slice(GOODPUT).state,
            highest_step=progress.highest_step,
            checkpoint_step=self.slice(CHECKPOINTS).checkpoint_step,
            rollbacks=progress.rollbacks,
            restoring=self.slice(INCIDENTS).restoring,
            failures=self.slice(BUDGET).failures,
            generation=fact.generation if isinstance(fact, Reported) else 0,
            slot=fact.slot if isinstance(fact, Reported) else 0,
        )


Table = dict[type, tuple[tuple[str, Callable[[Any, Any, Context], tuple[Any, Effects]]], ...]]


def _table(projections: tuple[Projection[Any], ...]) -> Table:
    """Build the dispatch table: for each kind of fact or report the folds that take it."""
    folds: defaultdict[type, list[tuple[str, Callable[[Any, Any, Context], tuple[Any, Effects]]]]] = defaultdict(list)
    for projection in projections:
        for rule in projection.rules:
            folds[rule.kind].append((projection.name, rule.fold))
    return {kind: tuple(found) for kind, found in folds.items()}
