"""The pace of a job, when it will be done, and the line that is written of each step."""

from __future__ import annotations

import json

import pytest

from pretrain_api.messages.reports import MemoryUse
from pretrain_api.status.records import StepRecord
from pretrain_operator.facts.pace import StepPace
from pretrain_operator.projections.progress import expected_end
from support.operator.ledger import Book
from support.operator.world import NOON, a_generation, a_restore, a_step, announced, said

OLD_LINE = (
    '{"step":1,"loss":2.0,"gradNorm":1.0,"learningRate":0.1,"tokens":9,"tokensPerSecond":8.0,"generation":1,'
    '"workers":2,"time":5.0}'
)


def test_the_pace_counts_pauses_and_forgets_steps_that_are_done_again() -> None:
    pace = StepPace()
    for step, time in ((1, 0.0), (2, 1.0), (3, 2.0)):
        pace = pace.stepped(step, time, 1.0)
    assert pace.mean_seconds == 1.0

    pace = pace.stepped(2, 9.0, 1.0)

    assert pace.mean_seconds == 9.0
    assert pace.stepped_at == 9.0


def test_the_median_of_the_durations_ignores_pauses() -> None:
    pace = StepPace()
    for step, time in ((1, 1.0), (2, 2.0), (3, 60.0), (4, 61.0)):
        pace = pace.stepped(step, time, 1.0)

    assert (pace.median_seconds, pace.mean_seconds) == (1.0, 20.0)
    assert StepPace().median_seconds == 0.0


def test_a_new_operator_goes_on_with_the_pace_that_was_written_down() -> None:
    pace = StepPace(known_mean=0.25).stepped(7, 1.0, 1.0)

    assert pace.mean_seconds == 0.25


@pytest.mark.parametrize(
    ("step", "stepped_at", "pace", "end"),
    [
        (40, 1_000_000_000.0, 2.0, "2001-09-09T01:48:40Z"),
        (100, 1_000_000_000.0, 2.0, ""),
        (40, None, 2.0, ""),
        (40, 1_000_000_000.0, None, ""),
        (40, 1e9, 1e300, ""),
    ],
)
def test_the_end_is_told_where_it_can_be_known(
    step: int, stepped_at: float | None, pace: float | None, end: str
) -> None:
    assert expected_end(step, 100, stepped_at, pace) == end


def test_a_step_is_written_down_with_its_parts_and_by_process() -> None:
    book = Book()
    memory = MemoryUse(bytes=1, peak_bytes=2, reserved_bytes=3, alloc_retries=4)
    more = {"compute_seconds": 0.5, "reduce_seconds": 0.25, "optimizer_seconds": 0.1, "mfu": 0.4, "memory": memory}
    for fact in (
        announced(0, a_generation(1, (0, 0), (1, 0))),
        said(1, 1, a_restore(0)),
        said(2, 1, a_step(1).model_copy(update=more)),
        said(4, 1, a_step(2).model_copy(update=more)),
    ):
        book.tell(fact)

    line, status = json.loads(book.records[-1].to_json()), book.status
    assert {name: line[name] for name in ("seconds", "computeSeconds", "reduceSeconds", "optimizerSeconds", "mfu")} == {
        "seconds": 1.0, "computeSeconds": 0.5, "reduceSeconds": 0.25, "optimizerSeconds": 0.1, "mfu": 0.4,
    }  # fmt: skip
    assert (line["memoryBytes"], line["memoryPeakBytes"], line["memoryReservedBytes"], line["allocRetries"]) == (
        1,
        2,
        3,
        4,
    )
    assert line["tokensPerSecondPerDevice"] == status.tokens_per_second_per_device == 50.0
    assert (status.mfu, status.seconds_per_step, book.view.stepped_at) == (0.4, 2.0, NOON + 4)


def test_lines_written_before_these_fields_were_there_are_still_read() -> None:
    record = StepRecord.from_json(OLD_LINE)

    assert (record.step, record.mfu, record.seconds) == (1, None, 0.0)
