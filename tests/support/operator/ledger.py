"""A ledger, for tests of its status and effects."""

from __future__ import annotations

from typing import Any

from pretrain_api.status.job import JobStatus, NodeFailure, Suspect
from pretrain_api.status.records import EvaluationResult, StepRecord
from pretrain_operator.cluster import Event, InjectedFault
from pretrain_operator.facts.fact import (
    Fact,
    FaultsInjected,
    GenerationAdopted,
    JobEnded,
    NodesObserved,
    PodsObserved,
    StartsFailed,
)
from pretrain_operator.projections.ledger import Ledger, Projected
from pretrain_operator.projections.projection import Measurement
from support.operator.world import NOON, a_generation, a_job, a_restore, a_step, announced, said


class Book:
    """A ledger with its effects so far."""

    def __init__(self, status: JobStatus | None = None, **recovery: Any) -> None:
        self.recovery = a_job(recovery=recovery).spec.recovery
        self.ledger = Ledger(status or JobStatus())
        self.records: list[StepRecord] = []
        self.evaluations: list[EvaluationResult] = []
        self.told: list[Event] = []
        self.measurements: list[Measurement] = []

    def tell(self, *facts: Fact) -> JobStatus:
        for fact in facts:
            effects = self.ledger.record(fact, self.recovery)
            self.records += effects.steps
            self.evaluations += effects.evaluations
            self.told += effects.events
            self.measurements += effects.measurements
        return self.status

    def after(self, *facts: Fact) -> Book:
        self.tell(*facts)
        return self

    def look(self, now: float, *, pods_run: bool, suspended: bool, faults: tuple[InjectedFault, ...] = ()) -> JobStatus:
        return self.tell(FaultsInjected(now, faults), PodsObserved(now, running=pods_run, suspended=suspended))

    def adopt(self, generation: Any) -> JobStatus:
        return self.tell(GenerationAdopted(NOON, generation))

    def nodes(self, *crashes: tuple[str, NodeFailure], now: float = NOON, silent: tuple[str, ...] = ()) -> JobStatus:
        return self.tell(NodesObserved(now, crashes, frozenset(silent)))

    def starts_failed(self, count: int, message: str) -> JobStatus:
        return self.tell(StartsFailed(NOON, count, message))

    def close(self, now: float, *, failed: bool) -> JobStatus:
        return self.tell(JobEnded(now, failed))

    def trains(self, steps: int = 2) -> Book:
        """Two workers complete these steps, a second each."""
        self.tell(announced(0, a_generation(1, (0, 0), (1, 0))), said(0, 1, a_restore(0)))
        self.tell(*[said(step, 1, a_step(step)) for step in range(1, steps + 1)])
        return self

    def again(self) -> Book:
        """Return the book of the next operator, which continues from the status."""
        book = Book(JobStatus.from_json(self.status.to_json()))
        book.recovery = self.recovery
        return book

    @property
    def status(self) -> JobStatus:
        return self.ledger.status()

    @property
    def view(self) -> Projected:
        return self.ledger.view()

    @property
    def events(self) -> list[str]:
        """Reasons of the events."""
        return [event.reason for event in self.told]

    @property
    def places(self) -> list[tuple[int, int]]:
        """Return (generation, step) of each record."""
        return [(record.generation, record.step) for record in self.records]

    @property
    def suspects(self) -> dict[str, Suspect]:
        return {suspect.node: suspect for suspect in self.view.suspects}
