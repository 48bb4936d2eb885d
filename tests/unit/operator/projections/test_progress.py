"""Progress as the facts tell it: steps, losses, checkpoints, generations."""

from __future__ import annotations

from pretrain_api.checkpoint.lineage import manifest_key
from pretrain_api.messages.reports import Evaluated, Finished, Held, Sampled, SaveFailed
from pretrain_api.status.job import GenerationSummary, JobStatus
from pretrain_api.status.records import EvaluationRecord, SampleRecord
from pretrain_operator.projections.evaluations import SAMPLE_LENGTH
from support.operator.ledger import Book
from support.operator.world import a_generation, a_restore, a_save, a_step, an_end, announced, said

ONE = a_generation(1, (0, 0), (1, 0))
TWO = a_generation(2, (0, 0), reason="WorkerLost")


def test_a_step_becomes_progress_and_a_record() -> None:
    book = Book()

    status = book.tell(announced(0, ONE), said(0, 1, a_restore(0)), said(1, 1, a_step(1, tokens=64)))

    assert (status.step, status.tokens, status.loss, status.generation, status.parameters) == (1, 64, 10.0, 1, 7)
    (record,) = book.records
    assert (record.step, record.tokens, record.generation, record.workers) == (1, 64, 1, 2)


def test_a_step_told_twice_is_recorded_once() -> None:
    book = Book()

    book.tell(announced(0, ONE), *[said(1, 1, a_step(1)) for _ in range(2)], said(2, 1, a_step(2)))

    assert [record.step for record in book.records] == [1, 2]


def test_a_step_told_after_its_generations_end_is_recorded_and_overcomes_nothing() -> None:
    book = Book()
    book.tell(announced(0, ONE), said(0, 1, a_restore(0)), said(1, 1, a_step(1)))

    status = book.tell(an_end(2, 1, step=1), said(2, 1, a_step(2)), announced(3, TWO), said(3, 1, a_step(3)))

    assert [record.step for record in book.records] == [1, 2, 3]
    assert (status.step, book.view.state, status.incidents[-1].resumed_seconds) == (3, "recovering", None)
    assert "Recovered" not in book.events


def test_a_step_that_the_lost_worker_had_not_told_is_told_by_the_state_that_shows_it() -> None:
    book = Book()
    book.tell(announced(0, ONE), said(0, 1, a_restore(0)), said(1, 1, a_step(1)))
    recalled = a_restore(0).model_copy(update={"step": 3, "steps": tuple(a_step(step) for step in (1, 2, 3))})

    status = book.tell(an_end(2, 1, step=1), announced(3, TWO), said(3, 2, recalled), said(4, 2, a_step(4)))

    assert book.places == [(1, 1), (1, 2), (1, 3), (2, 4)]
    assert [record.workers for record in book.records] == [2, 2, 2, 1]
    assert (status.step, status.bookkeeping.highest_step, status.incidents[-1].steps_lost) == (4, 4, 0)


def test_a_step_done_again_is_recorded_again_with_the_higher_generation() -> None:
    book = Book()

    book.tell(announced(0, ONE), said(0, 1, a_restore(0)), said(1, 1, a_step(1)), said(2, 1, a_step(2)))
    book.tell(an_end(2, 1, step=2), announced(3, TWO), said(3, 2, a_restore(1)), said(4, 2, a_step(2)))

    assert [(record.generation, record.step, record.workers) for record in book.records] == [
        (1, 1, 2),
        (1, 2, 2),
        (2, 2, 1),
    ]


def test_a_late_report_of_an_older_generation_is_dropped() -> None:
    book = Book()
    book.tell(announced(0, ONE), said(1, 1, a_step(1)), announced(2, TWO), said(3, 2, a_step(1)))

    status = book.tell(said(4, 1, a_step(9)))

    assert status.step == 1


def test_a_new_operator_goes_on_with_the_generation_that_runs() -> None:
    first = Book()
    status = first.tell(announced(0, ONE), said(0, 1, a_restore(0)), said(1, 1, a_step(1)))
    second = Book(JobStatus.from_json(status.to_json()))

    second.adopt(ONE)
    second.tell(said(1, 1, a_step(1)), said(2, 1, a_step(2)))

    assert [(record.step, record.workers) for record in second.records] == [(2, 2)]


def test_a_generation_is_listed_once_it_trains_with_the_step_it_started_at() -> None:
    book = Book()

    announced_only = book.tell(announced(0, ONE))
    status = book.tell(said(1, 1, a_restore(5)), said(2, 1, a_step(6)))

    assert announced_only.generations == ()
    assert status.generations == (GenerationSummary(number=1, workers=2, started_at_step=5, reason="Started"),)


def test_checkpoints_are_counted_and_the_newest_is_named() -> None:
    book = Book()

    status = book.tell(announced(0, ONE), *[said(step, 1, a_save(step)) for step in (3, 6, 6)])

    assert status.checkpoints.saved == 2
    assert status.checkpoints.latest_step == 6
    assert status.checkpoints.stall_seconds == 0.5
    assert status.latest_checkpoint == manifest_key(1, 6)
    assert book.events == ["GenerationFormed", "CheckpointSaved", "CheckpointSaved"]


def test_a_checkpoint_is_counted_even_if_the_hold_on_it_was_told_first() -> None:
    book = Book()
    held = Held(command_id="c", step=3, checkpoint=manifest_key(1, 3))

    status = book.tell(announced(0, ONE), said(3, 1, held, slot=1), said(3, 1, a_save(3)))

    assert (status.checkpoints.saved, status.checkpoints.latest_step) == (1, 3)


def test_after_falling_back_the_restored_checkpoint_is_the_newest() -> None:
    book = Book()

    status = book.tell(announced(0, ONE), said(1, 1, a_save(9)), announced(2, TWO), said(3, 2, a_restore(3)))

    assert (status.latest_checkpoint, status.checkpoints.latest_step, status.step) == (manifest_key(1, 3), 3, 3)


def test_a_failed_save_is_told_to_people() -> None:
    book = Book()

    book.tell(announced(0, ONE), said(1, 1, SaveFailed(step=3, message="disk is full")))

    assert book.events[-1] == "SaveFailed"


def test_losses_and_texts_of_the_model_are_kept() -> None:
    book = Book()

    status = book.tell(
        announced(0, ONE),
        said(1, 1, Evaluated(step=1, losses={"held-out": 2.5}, seconds=0.5)),
        said(2, 1, Sampled(step=1, prompt="To be", text=" or not")),
        said(3, 1, Finished(step=1, tokens=64, checkpoint="c")),
    )

    assert status.validation_loss == {"held-out": 2.5}
    assert status.sample == "To be or not"
    assert status.tokens == 64
    evaluation, sample = book.evaluations
    assert isinstance(evaluation, EvaluationRecord)
    assert isinstance(sample, SampleRecord)
    assert (evaluation.step, evaluation.losses, evaluation.generation) == (1, {"held-out": 2.5}, 1)
    assert (sample.step, sample.prompt, sample.text, sample.generation) == (1, "To be", " or not", 1)


def test_what_the_users_evaluation_came_to_is_kept_and_its_failure_told_to_people() -> None:
    book = Book()

    good = book.tell(announced(0, ONE), said(1, 1, Evaluated(step=1, losses={}, metrics={"right": 0.5}, seconds=1)))
    assert (good.evaluation_metrics, book.events[1:]) == ({"right": 0.5}, [])

    bad = book.tell(said(2, 1, Evaluated(step=2, losses={}, problem="KeyError: 1", seconds=1)))
    assert (bad.evaluation_metrics, book.events[1:]) == ({}, ["EvaluationHookFailed"])


def test_the_texts_of_one_step_stand_together_and_those_of_the_next_take_their_place() -> None:
    book = Book()

    first = book.tell(
        announced(0, ONE), *(said(n, 1, Sampled(step=1, number=n, prompt="", text=f"{n}")) for n in (0, 1))
    )
    second = book.tell(said(3, 1, Sampled(step=2, prompt="", text="2")))

    assert (first.sample, second.sample) == ("0\n\n1", "2")


def test_a_long_text_is_cut_in_the_status_only() -> None:
    book, text = Book(), "x" * 3 * SAMPLE_LENGTH

    status = book.tell(
        announced(0, ONE), *(said(n, 1, Sampled(step=1, number=n, prompt="", text=text)) for n in (0, 1))
    )

    assert status.sample == "x" * SAMPLE_LENGTH + "…"
    assert [len(record.text) for record in book.evaluations if isinstance(record, SampleRecord)] == [len(text)] * 2


def test_after_the_end_nothing_counts() -> None:
    book = Book()
    done = book.tell(announced(0, ONE), said(1, 1, a_step(1)), said(2, 1, Finished(step=1, tokens=1, checkpoint="c")))

    assert book.tell(an_end(3, 1, step=1)) == done
