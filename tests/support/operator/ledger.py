"""A ledger, for tests of what it says."""

from __future__ import annotations

from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import Appraisal, StepRecord
from pretrain_operator.facts.fact import Fact
from pretrain_operator.projections.ledger import Ledger
from support.operator.world import a_job


class Book:
    """A ledger with what it said."""

    def __init__(self, status: JobStatus | None = None) -> None:
        self.records: list[StepRecord] = []
        self.appraisals: list[Appraisal] = []
        self.events: list[str] = []
        self.ledger = Ledger(status or JobStatus(), self.records.append, self.appraisals.append)

    def tell(self, *facts: Fact) -> JobStatus:
        for fact in facts:
            self.events += [event.reason for event in self.ledger.record(fact, a_job().spec.recovery)]
        return self.ledger.status()

    @property
    def places(self) -> list[tuple[int, int]]:
        """(generation, step) of each record."""
        return [(record.generation, record.step) for record in self.records]
