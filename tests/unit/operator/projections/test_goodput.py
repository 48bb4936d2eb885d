"""Goodput: every second of a job's life is in exactly one state."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_api.messages.reports import Evaluated, Finished, Held, Resumed, Sampled
from pretrain_operator.facts.fact import Fact, Reported
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

ONE = a_generation(1, (0, 0), (1, 0))
TWO = a_generation(2, (0, 0), (1, 0))


def a_ledger(*facts: Fact) -> Book:
    ledger = Book()
    ledger.look(NOON, pods_run=True, suspended=False)
    ledger.tell(*facts)
    return ledger


def seconds(ledger: Book) -> dict[str, object]:
    goodput = ledger.status.goodput
    assert goodput is not None
    return {state: pytest.approx(value) for state, value in goodput.seconds.items()}


def started() -> tuple[Fact, ...]:
    return announced(2, ONE), said(3, 1, a_start(0)), said(3, 1, a_start(1)), said(4, 1, a_restore(0))


def test_a_job_is_queued_until_a_pod_runs_then_starts_then_restores_then_trains() -> None:
    ledger = Book()
    ledger.look(NOON, pods_run=False, suspended=False)
    ledger.look(NOON + 1, pods_run=True, suspended=False)
    ledger.tell(*started(), said(6, 1, a_step(1)))

    assert seconds(ledger) == {"queued": 1, "starting": 2, "restoring": 1, "training": 2}


def test_what_a_checkpoint_blocks_and_an_evaluation_takes_is_not_training() -> None:
    ledger = a_ledger(
        *started(),
        said(6, 1, a_step(1, stall=0.5)),
        said(9, 1, Evaluated(step=1, losses={}, seconds=2.0)),
        said(10, 1, a_step(2)),
    )

    assert seconds(ledger) == {"starting": 3, "restoring": 1, "training": 3.5, "saving": 0.5, "evaluating": 2}


def test_a_fault_costs_from_the_fault_until_the_state_is_restored_and_then_the_steps_done_again() -> None:
    ledger = a_ledger(
        *started(),
        said(5, 1, a_step(1)),
        said(6, 1, a_step(2)),
        said(7, 1, a_step(3)),
        an_end(8, 1, step=3, fault_time=NOON + 7.5),
        announced(8.5, TWO),
        said(9, 2, a_restore(1)),
        said(10, 2, a_step(2)),
        said(11, 2, a_step(3)),
        said(12, 2, a_step(4)),
    )

    assert seconds(ledger) == {"starting": 3, "restoring": 1, "training": 4.5, "recovering": 1.5, "redoing": 2}


def test_a_resize_holds_from_the_checkpoint_to_the_next_first_step() -> None:
    hold = Held(command_id="c", step=1, checkpoint="c")
    ledger = a_ledger(
        *started(),
        said(5, 1, hold, slot=1),
        said(5, 1, a_step(1)),
        said(5.5, 1, hold),
        an_end(6, 1, "Resized", step=1),
        announced(6.5, TWO),
        said(7, 2, a_restore(1)),
        said(9, 2, a_step(2, seconds=1.0)),
    )

    assert seconds(ledger) == {"starting": 3, "restoring": 1, "saving": 1, "holding": 3, "training": 1}


def test_a_hold_after_which_nothing_came_is_over() -> None:
    hold = Held(command_id="c", step=1, checkpoint="c")
    ledger = a_ledger(*started(), said(5, 1, a_step(1)), said(6, 1, hold))
    ledger.tell(said(8, 1, Resumed(command_id="c", step=1)), said(9, 1, a_step(2)))

    assert seconds(ledger) == {"starting": 3, "restoring": 1, "training": 2, "saving": 1, "holding": 2}


def test_the_time_between_two_runs_counts_as_suspended() -> None:
    ledger = a_ledger(*started(), said(5, 1, a_step(1)))
    ledger.look(NOON + 6, pods_run=False, suspended=True)
    ledger.look(NOON + 16, pods_run=False, suspended=False)
    ledger.look(NOON + 17, pods_run=True, suspended=False)

    assert seconds(ledger) == {"starting": 3, "restoring": 1, "training": 2, "suspended": 10, "queued": 1}


def test_the_ratio_is_training_over_all_but_queued_and_suspended() -> None:
    ledger = Book()
    ledger.look(NOON - 100, pods_run=False, suspended=False)
    ledger.look(NOON, pods_run=True, suspended=False)
    ledger.tell(*started(), said(16, 1, a_step(1)))

    goodput = ledger.status.goodput

    assert goodput is not None
    assert goodput.ratio == 0.75


def test_looking_at_an_idle_job_changes_nothing() -> None:
    ledger = a_ledger(*started(), said(5, 1, a_step(1)))
    before = ledger.status

    ledger.look(NOON + 1000, pods_run=True, suspended=False)

    assert ledger.status == before


def test_an_outage_of_the_operator_counts_as_what_the_reports_say_afterwards() -> None:
    before = a_ledger(*started(), said(5, 1, a_step(1)))
    after = before.again()

    after.look(NOON + 60, pods_run=True, suspended=False)
    after.tell(*[said(4 + step, 1, a_step(step)) for step in range(2, 61)])

    assert seconds(after) == {"starting": 3, "restoring": 1, "training": 60}


def _facts() -> st.SearchStrategy[Fact]:
    time = st.floats(-5, 100)
    number = st.integers(1, 4)
    step = st.integers(1, 20)
    span = st.floats(0, 30)
    body = st.one_of(
        st.builds(a_start, st.integers(0, 1)),
        st.builds(a_restore, step),
        st.builds(lambda s, d, t: a_step(s, seconds=d, stall=t), step, span, span),
        st.builds(a_save, step),
        st.builds(lambda s: Held(command_id="c", step=s, checkpoint="c"), step),
        st.builds(lambda s: Resumed(command_id="c", step=s), step),
        st.builds(lambda s, d: Evaluated(step=s, losses={}, seconds=d), step, span),
        st.builds(lambda s: Sampled(step=s, prompt="", text=""), step),
    )
    ends = st.sampled_from(["WorkerLost", "RankFailed", "Resized", "Suspended", "CheckpointRejected"])
    return st.one_of(
        st.builds(lambda t, n, b: said(t, n, b), time, number, body),
        st.builds(lambda t, n: announced(t, a_generation(n, (0, 0), (1, 0))), time, number),
        st.builds(lambda t, n, c, s: an_end(t, n, c, fault_time=NOON + t - s), time, number, ends, span),
    )


@settings(max_examples=200, deadline=None)
@given(facts=st.lists(_facts(), max_size=40), restart=st.integers(0, 40), suspended=st.lists(st.booleans(), max_size=5))
def test_the_states_sum_to_the_elapsed_time_whatever_happens(
    facts: list[Fact], restart: int, suspended: list[bool]
) -> None:
    ledger = a_ledger()
    for index, fact in enumerate(facts):
        if index == restart:
            ledger = ledger.again()
        ledger.tell(fact)
        if isinstance(fact, Reported) and suspended:
            ledger.look(fact.time, pods_run=True, suspended=suspended.pop())
    end = NOON + 200
    ledger.close(end, failed=True)

    goodput = ledger.status.goodput

    assert goodput is not None
    assert sum(goodput.seconds.values()) == pytest.approx(end - NOON)
    assert all(value >= 0 for value in goodput.seconds.values())
    assert 0 <= goodput.ratio <= 1


def test_the_clock_stops_when_the_job_is_done() -> None:
    ledger = a_ledger(*started(), said(5, 1, a_step(1)), said(6, 1, Finished(step=1, tokens=1, checkpoint="c")))

    ledger.close(NOON + 100, failed=False)

    assert seconds(ledger) == {"starting": 3, "restoring": 1, "training": 1, "saving": 1}
