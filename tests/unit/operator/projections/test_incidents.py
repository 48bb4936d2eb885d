"""Incidents: what happened, when it was noticed, how long each part of the recovery took, what was lost."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from pretrain_api.checkpoint.lineage import manifest_key
from pretrain_api.messages.reports import CheckpointRejected
from pretrain_api.status.job import Incident, JobStatus
from pretrain_operator.cluster import InjectedFault
from pretrain_operator.facts.fact import Fact
from support.operator.ledger import Book
from support.operator.world import (
    NOON,
    a_generation,
    a_restore,
    a_save,
    a_start,
    a_step,
    an_end,
    announced,
    said,
)

THREE = a_generation(1, (0, 0), (1, 0), (2, 0))
TWO = a_generation(2, (0, 0), (2, 0), reason="WorkerLost")


def told(*facts: Fact, ledger: Book | None = None) -> Book:
    ledger = ledger or Book()
    ledger.tell(*facts)
    return ledger


def trained(until: int) -> Iterable[Fact]:
    """Generation 1 trains, a step a second, with a checkpoint of step 3."""
    yield announced(0.0, THREE)
    yield said(0.0, 1, a_restore(0))
    for step in range(1, until + 1):
        yield said(step, 1, a_step(step))
        if step == 3:
            yield said(step, 1, a_save(3))


def recovered(number: int = 2, start: float = 5.0) -> Iterable[Fact]:
    yield announced(start + 0.25, TWO.model_copy(update={"number": number}))
    yield said(start + 0.375, number, a_start(0))
    yield said(start + 0.5, number, a_start(1), slot=2)
    yield said(start + 0.625, number, a_restore(3))
    yield said(start + 1.0, number, a_step(4, seconds=0.375))


def incidents(ledger: Book) -> tuple[Incident, ...]:
    return ledger.status.incidents


def test_an_incident_tells_each_part_of_the_recovery_in_seconds_since_the_fault() -> None:
    ledger = told(*trained(5), an_end(5.125, 1, step=5, slot=1, node="n", fault_time=NOON + 5.0), *recovered())

    (incident,) = incidents(ledger)

    assert (incident.cause, incident.worker, incident.node, incident.step) == ("WorkerLost", 1, "n", 5)
    assert incident.time == NOON + 5.0
    assert incident.detected_seconds == 0.125
    assert incident.reformed_seconds == 0.25
    assert incident.restarted_seconds == 0.5
    assert incident.restored_seconds == 0.625
    assert incident.resumed_seconds == 1.0
    assert incident.steps_lost == 2
    assert incident.action == "Reformed"


def test_seconds_count_from_the_injected_fault_that_explains_it() -> None:
    ledger = told(*trained(5), an_end(5.125, 1, step=5, slot=1, fault_time=NOON + 5.1), *recovered())
    faults = (
        InjectedFault(NOON + 4.0, 1, "kill:worker=1,step=4"),
        InjectedFault(NOON + 5.0, 1, "kill:worker=1,step=5"),
        InjectedFault(NOON + 5.0625, 2, "kill:worker=2,step=5"),
        InjectedFault(NOON + 6.0, 1, "kill:worker=1,step=6"),
    )

    ledger.look(NOON + 6, pods_run=True, suspended=False, faults=faults)

    assert incidents(ledger)[0].time == NOON + 5.0
    assert incidents(ledger)[0].detected_seconds == 0.125


def test_a_fault_is_used_once_also_by_an_operator_that_starts_anew() -> None:
    faults = (InjectedFault(NOON + 5.0, 1, "kill:worker=1,step=5"),)
    ledger = told(*trained(5), an_end(5.125, 1, step=5, slot=1), *recovered())
    ledger.look(NOON + 6, pods_run=True, suspended=False, faults=faults)
    again = told(an_end(7.0, 2, step=5, slot=1), ledger=ledger.again())

    again.look(NOON + 8, pods_run=True, suspended=False, faults=faults)

    assert [incident.time for incident in incidents(again)] == [NOON + 5.0, NOON + 7.0]


@pytest.mark.parametrize(
    "fault",
    [
        InjectedFault(NOON + 4.9, 1, "term:worker=1,step=4"),
        InjectedFault(NOON + 4.9, None, "kill:coordinator,step=4"),
        InjectedFault(NOON - 300.0, 1, "kill:worker=1,step=0"),
        InjectedFault(NOON - 20.0, 2, "kill:rank=2,step=0"),
    ],
    ids=lambda fault: fault.description,
)
def test_a_fault_that_explains_nothing_is_left_alone(fault: InjectedFault) -> None:
    ledger = told(*trained(5), an_end(5.0, 1, step=5, slot=1))

    ledger.look(NOON + 6, pods_run=True, suspended=False, faults=(fault,))

    assert incidents(ledger)[0].time == NOON + 5.0


def test_a_fault_that_another_worker_noticed_first_is_found() -> None:
    ledger = told(*trained(5), an_end(5.0, 1, "RankFailed", step=5, slot=0))

    ledger.look(NOON + 6, pods_run=True, suspended=False, faults=(InjectedFault(NOON + 4.5, 1, "kill:rank=1"),))

    assert incidents(ledger)[0].detected_seconds == 0.5


def test_the_same_workers_again_is_a_restart() -> None:
    again = THREE.model_copy(update={"number": 2})

    ledger = told(*trained(5), an_end(5.0, 1, "RankFailed", step=5), announced(5.5, again))

    assert incidents(ledger)[0].action == "Restarted"


def test_intended_ends_are_no_incidents() -> None:
    for cause in ("Resized", "WorkerJoined", "WorkerLeft", "Suspended"):
        assert incidents(told(*trained(5), an_end(5.0, 1, cause, step=5))) == ()


def test_a_second_fault_before_the_recovery_is_an_incident_of_its_own() -> None:
    ledger = told(
        *trained(5),
        an_end(5.0, 1, step=5, slot=1),
        announced(5.25, TWO),
        an_end(5.5, 2, step=5, slot=0),
        *recovered(3, start=6.0),
    )

    first, second = incidents(ledger)

    assert (first.reformed_seconds, second.reformed_seconds) == (1.25, 0.75)
    assert (first.resumed_seconds, second.resumed_seconds) == (2.0, 1.5)
    assert (first.steps_lost, second.steps_lost) == (2, 0), "steps are lost once"


def test_a_part_that_was_not_reached_is_null() -> None:
    (incident,) = incidents(told(*trained(5), an_end(5.0, 1, step=5)))

    assert incident.detected_seconds == 0.0
    assert (incident.reformed_seconds, incident.restored_seconds, incident.resumed_seconds) == (None, None, None)
    assert incident.steps_lost is None


def test_the_last_rank_may_say_that_it_started_after_all_else() -> None:
    facts = list(recovered())
    late = facts.pop(2)

    ledger = told(*trained(5), an_end(5.0, 1, step=5), *facts, late)

    assert incidents(ledger)[0].restarted_seconds == 0.5


def test_a_later_generations_ranks_do_not_change_an_old_incident() -> None:
    ledger = told(*trained(5), an_end(5.0, 1, step=5), *recovered())
    before = incidents(ledger)

    told(an_end(20.0, 2, "Resized", step=9), *recovered(3, start=20.0), ledger=ledger)

    assert incidents(ledger) == before


def test_a_corrupt_checkpoint_is_an_incident_that_names_it() -> None:
    key = manifest_key(1, 3)
    ledger = told(
        *trained(5),
        an_end(5.0, 1, step=5, slot=1),
        announced(5.25, TWO),
        said(5.5, 2, CheckpointRejected(checkpoint=key, message="digest differs")),
        said(5.5, 2, CheckpointRejected(checkpoint=key, message="digest differs, says another rank"), slot=2),
        an_end(5.5, 2, "CheckpointRejected", message="digest differs"),
        announced(5.75, TWO.model_copy(update={"number": 3})),
        said(6.0, 3, a_restore(1)),
        said(6.25, 3, a_step(2)),
    )

    lost, corrupt = incidents(ledger)

    assert (corrupt.cause, corrupt.action) == ("CheckpointCorrupt", "FellBack")
    assert key in corrupt.message
    assert corrupt.resumed_seconds == 0.75
    assert (lost.steps_lost, corrupt.steps_lost) == (2, 2), "each step is lost to one cause"


def test_an_incident_goes_on_in_an_operator_that_starts_anew() -> None:
    ledger = told(*trained(5), an_end(5.0, 1, step=5, slot=1))
    status = JobStatus.from_json(ledger.status.to_json())

    (incident,) = incidents(told(*recovered(), ledger=Book(status)))

    assert (incident.resumed_seconds, incident.steps_lost) == (1.0, 2)


def test_reading_incidents_back_changes_nothing() -> None:
    ledger = told(*trained(5), an_end(5.1234567, 1, step=5, fault_time=NOON + 5.0987654321), *recovered())
    status = JobStatus.from_json(ledger.status.to_json())

    assert Book(status).status == status


def test_what_the_job_ended_over_is_a_failure() -> None:
    ledger = told(*trained(5), an_end(5.0, 1, step=5))

    ledger.close(NOON + 6, failed=True)

    assert incidents(ledger)[0].action == "Failed"
