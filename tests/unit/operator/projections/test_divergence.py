"""What people and programs are told of a loss that diverged."""

from __future__ import annotations

from typing import Any

from pretrain_api.checkpoint.lineage import StepRange, manifest_key
from pretrain_api.messages.reports import Diverged, Failed
from pretrain_api.status.job import GenerationSummary, Incident
from pretrain_operator.facts.fact import Fact
from support.operator.ledger import Book
from support.operator.world import (
    NOON,
    a_generation,
    a_restore,
    a_rolled_back,
    a_save,
    a_step,
    an_end,
    announced,
    said,
)

ONE = a_generation(1, (0, 0), (1, 0))
TWO = a_generation(3, (0, 0), reason="WorkerLost")
SKIPPED = StepRange(first=7, last=16)


def a_divergence(step: int = 9, action: Any = "Rollback", cause: Any = "LossSpike") -> Diverged:
    return Diverged(
        step=step, since=step - 1, cause=cause, action=action, seconds=0.5, message="loss 9 where 3 is usual"
    )


def trained() -> tuple[Fact, ...]:
    """Two workers do eight steps, a second each, with a checkpoint of step 3 and one of step 8."""
    steps = [said(step, 1, a_step(step)) for step in range(1, 9)]
    return (announced(0, ONE), said(0, 1, a_restore(0)), *steps, said(3, 1, a_save(3)), said(8, 1, a_save(8)))


def rolled_back() -> tuple[Fact, ...]:
    """Both ranks say so, one of them late."""
    report = a_rolled_back(2)
    return (
        said(9, 1, a_divergence()),
        said(10, 1, report),
        said(11, 1, a_step(4)),
        said(11, 1, report, slot=1),
        said(12, 1, a_step(5)),
    )


def test_a_rollback_to_a_state_in_memory_leaves_the_checkpoint_the_latest() -> None:
    report = a_rolled_back(2, to_step=6).model_copy(update={"checkpoint": manifest_key(1, 3)})

    status = Book().tell(*trained(), said(9, 1, a_divergence()), said(10, 1, report))

    assert (status.step, status.latest_checkpoint, status.checkpoints.latest_step) == (6, manifest_key(1, 3), 3)


def test_a_rollback_is_an_incident_with_what_it_cost() -> None:
    book = Book()
    status = book.tell(*trained(), *rolled_back())

    (incident,) = status.incidents
    assert incident == Incident(
        cause="LossSpike",
        step=8,
        time=NOON + 8.5,
        detected_seconds=0.5,
        restored_seconds=1.5,
        resumed_seconds=2.5,
        steps_lost=5,
        action="RolledBack",
        message="step 9: loss 9 where 3 is usual",
    )
    assert book.events[-3:] == ["LossSpike", "RolledBack", "Recovered"]


def test_after_a_rollback_steps_are_those_of_a_higher_generation_and_what_was_skipped_is_on_record() -> None:
    book = Book()
    status = book.tell(*trained(), *rolled_back())

    assert book.places == [*((1, step) for step in range(1, 9)), (2, 4), (2, 5)]
    assert (status.step, status.skipped, status.rollbacks, status.generation) == (5, (SKIPPED,), 1, 2)
    assert status.latest_checkpoint == manifest_key(1, 3)
    assert status.checkpoints.latest_step == 3
    assert status.generations[-1] == GenerationSummary(
        number=2, workers=2, started_at_step=3, reason="RolledBack", formed_as=1
    )
    assert book.view.state == "redoing"


def test_an_operator_that_starts_anew_goes_on_counting() -> None:
    first = Book()
    status = first.tell(*trained(), *rolled_back())

    book = Book(status)
    book.adopt(ONE)
    after = book.tell(said(12, 1, a_step(5)), said(13, 1, a_step(6)), said(13, 1, a_rolled_back(2), slot=1))

    assert book.places == [(2, 6)]
    assert (after.step, after.rollbacks, len(after.incidents)) == (6, 1, 1)


def test_a_rollback_whose_ranks_died_before_they_could_say_so_is_known_from_the_next_generation() -> None:
    book = Book()
    restored = a_restore(3).model_copy(update={"rollbacks": (a_rolled_back(2).rollback,), "skipped": (SKIPPED,)})

    status = book.tell(
        *trained(),
        said(9, 1, a_divergence()),
        an_end(10, 1, step=8, slot=0),
        announced(11, TWO),
        said(12, 3, restored),
        said(13, 3, a_step(4)),
    )

    assert [(incident.cause, incident.action) for incident in status.incidents] == [
        ("LossSpike", "RolledBack"),
        ("WorkerLost", "Reformed"),
    ]
    assert (status.skipped, status.rollbacks) == ((SKIPPED,), 1)
    assert book.places[-1] == (3, 4)


def test_dropped_updates_in_a_row_are_one_incident_and_their_steps_count() -> None:
    book = Book()
    drops = [said(step, 1, a_divergence(step, "Drop", "LossNotFinite")) for step in (9, 10, 11)]

    status = book.tell(*trained(), *drops, said(12, 1, a_step(12)))

    assert [(item.cause, item.action, item.steps_lost) for item in status.incidents] == [
        ("LossNotFinite", "UpdateDropped", 0)
    ]
    assert book.events.count("LossNotFinite") == 1
    assert book.places[-1] == (1, 12)
    assert book.view.recovering == ""


def test_a_warning_is_an_incident_that_stops_nothing() -> None:
    book = Book()
    status = book.tell(*trained(), said(9, 1, a_divergence(9, "Warn")), said(9, 1, a_step(9)))

    assert [(item.cause, item.action) for item in status.incidents] == [("LossSpike", "Warned")]
    assert (status.step, book.view.recovering) == (9, "")


def test_a_divergence_that_ends_the_job_is_an_incident_that_failed() -> None:
    book = Book()
    book.tell(*trained(), said(9, 1, a_divergence()), said(9, 1, Failed(rank=0, reason="Diverged", retryable=False)))
    book.close(NOON + 10, failed=True)

    assert [(item.cause, item.action) for item in book.status.incidents] == [("LossSpike", "Failed")]
