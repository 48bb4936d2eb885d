"""What the facts say of nodes, of ranks that wait, of saves, and the story that people are told of a recovery."""

from __future__ import annotations

from pretrain_api.messages.reports import Blocked, Failed, ReportBody, Unblocked
from pretrain_api.status.job import NodeFailure, Obstacle
from pretrain_operator.cluster import Event
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

TWO = a_generation(1, (0, 0), (1, 0))
NO_STORAGE = Blocked(reason="StorageUnavailable", message="nobody answers at http://s3; start it")


# --- nodes ------------------------------------------------------------------------------------------------------------


def test_a_worker_that_fell_silent_counts_against_its_node() -> None:
    book = Book().trains().after(an_end(3, 1, "WorkerSilent", slot=1, node="node-1"))

    suspect = book.suspects["node-1"]

    assert suspect.failures == (NodeFailure(time=NOON + 3, cause="WorkerSilent"),)
    assert suspect.silent_at == NOON + 3


def test_ranks_that_something_killed_count_against_their_node_and_those_that_failed_do_not() -> None:
    killed, failed = Book().trains(), Book().trains()
    killed.after(
        said(3, 1, Failed(rank=1, exit_code=-9, reason="Killed"), 1), an_end(3, 1, "RankFailed", node="node-1")
    )
    failed.after(said(3, 1, Failed(rank=1, exit_code=1, reason="Error"), 1), an_end(3, 1, "RankFailed", node="node-1"))

    assert [failure.cause for failure in killed.suspects["node-1"].failures] == ["Killed"]
    assert failed.suspects == {}


def test_a_rule_that_says_quarantine_makes_the_node_a_suspect_at_once() -> None:
    book = Book(rules=[{"onLog": "Xid 79", "action": "Quarantine"}]).trains()

    book.after(said(3, 1, Failed(rank=1, reason="Error", message="NVRM: Xid 79"), 1))
    book.nodes(now=NOON + 3)

    assert book.suspects["node-1"].quarantined_at == NOON + 3
    assert book.suspects["node-1"].avoided
    assert "node-0" not in book.suspects


def test_the_same_crashed_pod_seen_again_and_by_a_new_operator_counts_once() -> None:
    book, crash = Book(), ("node-1", NodeFailure(time=NOON, cause="OOMKilled"))
    for _ in range(2):
        book.nodes(crash)
    anew = book.again()

    anew.nodes(crash, now=NOON + 5)

    assert len(anew.suspects["node-1"].failures) == 1
    assert not anew.suspects["node-1"].avoided


def test_suspects_survive_a_restart_of_the_operator() -> None:
    book = Book().trains().after(an_end(3, 1, "WorkerSilent", slot=1, node="node-1"))

    assert book.again().suspects == book.suspects


# --- ranks that wait --------------------------------------------------------------------------------------------------


def test_what_ranks_wait_for_is_known_until_they_go_on() -> None:
    book = Book().after(announced(0, TWO), said(1, 1, NO_STORAGE))
    assert book.view.ranks_wait == Obstacle(reason="StorageUnavailable", message=NO_STORAGE.message)

    book.after(said(2, 1, Unblocked()))

    assert book.view.ranks_wait is None


def test_a_step_or_another_generation_shows_that_they_wait_no_more() -> None:
    for fact in (said(5, 1, a_step(3)), an_end(5, 1, "Hang"), announced(5, a_generation(2, (0, 0)))):
        assert Book().trains().after(said(3, 1, NO_STORAGE), fact).view.ranks_wait is None


def test_a_new_operator_knows_that_ranks_wait_but_not_those_of_a_generation_that_it_finds_replaced() -> None:
    book = Book().trains().after(said(3, 1, NO_STORAGE))
    same, other = book.again(), book.again()

    same.adopt(TWO)
    other.adopt(a_generation(2, (0, 0)))

    assert same.view.ranks_wait == book.view.ranks_wait
    assert other.view.ranks_wait is None


def test_waiting_between_two_steps_is_no_training_and_costs_nothing() -> None:
    book = Book().trains().after(said(3, 1, NO_STORAGE), said(63, 1, Unblocked()), said(64, 1, a_step(3, seconds=62)))

    goodput = book.status.goodput

    assert goodput is not None
    assert goodput.seconds["recovering"] == 60.0
    assert goodput.seconds["training"] == 4.0
    assert (book.view.state, book.view.spent.restarts, book.status.incidents) == ("training", (), ())


# --- saves ------------------------------------------------------------------------------------------------------------


def saves(*seconds: float) -> tuple[ReportBody, ...]:
    return tuple(a_save(step).model_copy(update={"seconds": took}) for step, took in enumerate(seconds, start=1))


def test_the_grace_comes_from_the_slowest_of_the_last_saves() -> None:
    def grace(*seconds: float) -> float:
        return Book().trains().after(*[said(9, 1, save) for save in saves(*seconds)]).again().view.grace_seconds

    assert grace() == 30.0
    assert grace(1.0) == 30.0
    assert grace(20.0, 40.0, 10.0) == 120.0
    assert grace(1000.0) == 600.0
    assert grace(40.0, 1.0, 1.0, 1.0, 1.0, 1.0) == 30.0


# --- the story --------------------------------------------------------------------------------------------------------


def test_a_recovery_is_told_in_three_lines() -> None:
    book = Book().trains(4)
    book.told.clear()

    book.after(
        an_end(4.5, 1, step=4, slot=1, node="node-1", message="its connection broke", fault_time=NOON + 4.25),
        announced(4.75, a_generation(2, (0, 0), reason="WorkerLost")),
        said(5, 2, a_start(0)),
        said(5, 2, a_restore(2)),
        said(5.75, 2, a_step(3)),
        said(6.75, 2, a_step(4)),
    )

    assert book.told == [
        Event("Warning", "WorkerLost", "generation 1 ended at step 4 (worker 1) on node-1: its connection broke"),
        Event("Normal", "GenerationFormed", "generation 2 with 1 worker: WorkerLost"),
        Event(
            "Normal",
            "Recovered",
            "step 3 completed by 1 worker, 1.5 s after the fault (WorkerLost), 2 steps to redo",
        ),
    ]
