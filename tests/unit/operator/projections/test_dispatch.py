"""Dispatch of facts: each kind goes to its projections through one table, and a new kind needs one projection only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import pytest

from pretrain_api.base import Wire
from pretrain_api.messages.reports import Evaluating, NumberTaken, Progress, ReportBody
from pretrain_api.status.job import Bookkeeping, JobStatus
from pretrain_operator.cluster import Event
from pretrain_operator.facts.fact import Fact
from pretrain_operator.projections.ledger import PROJECTIONS, Ledger
from pretrain_operator.projections.projection import Context, Effects, Projection, on
from support.operator.ledger import Book
from support.operator.world import a_job, said

REPORTS = set(get_args(get_args(ReportBody)[0]))
FACTS = set(get_args(Fact)) - {type(said(0, 1, Progress(step=1)))}
FOR_THE_COORDINATOR_ONLY = {Evaluating, NumberTaken, Progress}
FOLDED = {kind for projection in PROJECTIONS for kind in projection.folds}
RECOVERY = a_job().spec.recovery


class Overheated(Wire):
    """A kind of report that no other module knows."""

    kind: Literal["overheated"] = "overheated"
    celsius: float


@dataclass(frozen=True)
class HeatSlice:
    highest: float = 0.0


def overheated(slice_: HeatSlice, body: Overheated, context: Context) -> tuple[HeatSlice, Effects]:
    event = Event("Warning", "Overheated", f"worker {context.slot}: {body.celsius:g} degrees")
    return replace(slice_, highest=max(slice_.highest, body.celsius)), Effects(events=(event,))


HEAT = Projection(
    name="heat",
    restore=lambda status: HeatSlice(),
    write=lambda slice_, status: status.model_copy(update={"message": f"{slice_.highest:g} degrees"}),
    rules=(on(Overheated, overheated),),
)


def test_a_new_kind_of_report_needs_its_type_and_one_projection() -> None:
    ledger = Ledger(JobStatus(), (*PROJECTIONS, HEAT))

    effects = ledger.record(said(1, 1, cast("Any", Overheated(celsius=95)), slot=2), RECOVERY)

    assert effects.events == (Event("Warning", "Overheated", "worker 2: 95 degrees"),)
    assert ledger.slice(HEAT) == HeatSlice(95)
    assert ledger.status().message == "95 degrees"


def test_a_kind_without_a_projection_changes_nothing() -> None:
    book = Book()
    before = book.status

    assert book.tell(said(1, 1, cast("Any", Overheated(celsius=95)))) == before


def test_each_kind_of_report_has_a_projection_or_is_the_coordinators_alone() -> None:
    assert {kind.__name__ for kind in REPORTS - FOLDED} == {kind.__name__ for kind in FOR_THE_COORDINATOR_ONLY}


def test_each_fact_has_a_projection() -> None:
    assert FACTS <= FOLDED


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda projection: projection.name)
def test_a_slice_is_written_as_it_was_read(projection: Projection[Any]) -> None:
    status = Book().trains().status

    assert projection.write(projection.restore(status), status) == status


def test_no_field_of_the_status_is_written_by_two_projections() -> None:
    """Each projection changes fields of its own when the status that it restored from was another one."""
    trained, fresh = Book().trains().status, JobStatus()
    written: dict[str, str] = {}
    for projection in PROJECTIONS:
        changed = projection.write(projection.restore(trained), fresh)
        for name in (*_different(changed, fresh), *_different(changed.bookkeeping, fresh.bookkeeping)):
            if name != "bookkeeping":
                assert written.setdefault(name, projection.name) == projection.name


def _different(status: JobStatus | Bookkeeping, other: JobStatus | Bookkeeping) -> list[str]:
    return [name for name in type(status).model_fields if getattr(status, name) != getattr(other, name)]
