"""A projection: one slice of the status, and the pure folds that facts change it by.

A fold takes the slice, a fact (of a report its body) and the context of the fact, and returns the new slice with its
effects. It sees every other slice as it was before the fact, so that the order of projections does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from pretrain_api.messages.reports import Failed
from pretrain_api.spec.job import Recovery
from pretrain_api.status.job import GoodputState, JobStatus
from pretrain_api.status.records import EvaluationResult, StepRecord
from pretrain_operator.cluster import Event
from pretrain_operator.facts.log import LineagePosition
from pretrain_operator.projections.membership import Membership

Slice = TypeVar("Slice")
Kind = TypeVar("Kind")

Measure = Literal[
    "checkpoint_bytes", "checkpoint_failures", "checkpoint_seconds", "checkpoint_stall", "loss_spikes",
    "nonfinite_losses", "restarts", "rollbacks",
]  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """A number for Prometheus."""

    measure: Measure
    value: float = 1.0
    label: str = ""
    """Cause of a restart."""


@dataclass(frozen=True)
class Effects:
    """Output of a fold besides the slice: each part goes out once."""

    events: tuple[Event, ...] = ()
    steps: tuple[StepRecord, ...] = ()
    evaluations: tuple[EvaluationResult, ...] = ()
    measurements: tuple[Measurement, ...] = ()

    def __add__(self, other: Effects) -> Effects:
        return Effects(
            self.events + other.events,
            self.steps + other.steps,
            self.evaluations + other.evaluations,
            self.measurements + other.measurements,
        )


NO_EFFECTS = Effects()


@dataclass(frozen=True)
class Context:
    """Origin of a fact, and the values of other slices that folds depend on, as they were before the fact."""

    time: float
    recovery: Recovery
    """The job's rules."""
    before: LineagePosition
    position: LineagePosition
    """Place of the run after the fact."""
    membership: Membership
    state: GoodputState
    highest_step: int
    checkpoint_step: int
    rollbacks: int
    restoring: bool
    """An incident is open and no state is restored since."""
    failures: tuple[Failed, ...]
    """Ranks of the current generation that failed."""
    generation: int = 0
    """Generation that reported the fact; 0: no rank did."""
    slot: int = 0

    @property
    def number(self) -> int:
        """Lineage number of the ranks that reported the fact."""
        return self.position.number(self.generation)

    @property
    def late(self) -> bool:
        """The generation that reported the fact has ended."""
        return self.generation == self.before.ended


def counted(number: int, noun: str) -> str:
    """Write a number with its noun in singular or plural."""
    return f"{number} {noun}{'s' * (number != 1)}"


Fold = Callable[[Slice, Kind, Context], tuple[Slice, Effects]]


@dataclass(frozen=True)
class FoldRule(Generic[Slice]):
    """The fold of one kind of fact or report."""

    kind: type
    fold: Callable[[Slice, Any, Context], tuple[Slice, Effects]]


def on(kind: type[Kind], fold: Fold[Slice, Kind]) -> FoldRule[Slice]:
    """Bind a fold to the type of fact, or of report body, that it takes."""
    return FoldRule(kind, fold)


@dataclass(frozen=True)
class Projection(Generic[Slice]):
    """A slice of the status with the folds that change it."""

    name: str
    restore: Callable[[JobStatus], Slice]
    """Read the slice from a status as last written."""
    write: Callable[[Slice, JobStatus], JobStatus]
    """Return the status with the slice in it."""
    rules: tuple[FoldRule[Slice], ...]

    @property
    def folds(self) -> Mapping[type, Callable[[Slice, Any, Context], tuple[Slice, Effects]]]:
        """Folds by the type that they take."""
        return {rule.kind: rule.fold for rule in self.rules}
