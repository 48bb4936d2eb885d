"""Invariant 5: a job that makes no checkpoint progress stops within its budget; one that does never runs out of it."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain_api.messages.reports import CheckpointRejected, Failed
from pretrain_api.spec.job import Recovery
from pretrain_api.status.job import JobStatus
from pretrain_operator.decide.slots import restart_delay
from pretrain_operator.facts.fact import StartsFailed
from pretrain_operator.projections.ledger import Ledger
from support.operator.world import NOON, a_generation, a_job, a_restore, a_save, a_step, an_end, announced, said


def recovery(**fields: Any) -> Recovery:
    return a_job(recovery=fields).spec.recovery


def a_ledger() -> Ledger:
    return Ledger(JobStatus())


class Run:
    """A job that fails again and again."""

    def __init__(self, rules: Recovery | None = None) -> None:
        self.ledger = a_ledger()
        self.recovery = rules or recovery()
        self.time = 0.0
        self.number = 0

    def generation(self, *, saved: int | None = None, lost: int | None = None) -> None:
        self.number += 1
        members = [(slot, self.number if slot == lost else 0) for slot in range(2)]
        self.tell(announced(self.time, a_generation(self.number, *members)))
        self.tell(said(self.time, self.number, a_restore(0)))
        if saved is not None:
            self.tell(said(self.time, self.number, a_step(saved)))
            self.tell(said(self.time, self.number, a_save(saved, self.number)))

    def fails(self, cause: str, *reports: Failed, seconds: float = 1.0) -> None:
        self.time += seconds
        for report in reports:
            self.tell(said(self.time, self.number, report))
        self.tell(an_end(self.time, self.number, cause))

    def tell(self, fact: Any) -> None:
        self.ledger.record(fact, self.recovery)

    @property
    def exhausted(self) -> str:
        return self.ledger.view().spent.exhausted(self.recovery.budget, NOON + self.time)


def a_failure(**fields: Any) -> Failed:
    return Failed(**{"rank": 0, "exit_code": 1, "reason": "Error", "message": "boom"} | fields)


@pytest.mark.parametrize("cause", ["RankFailed", "Hang", "CheckpointRejected"])
def test_a_program_that_fails_three_times_in_a_row_without_a_checkpoint_is_out_of_budget(cause: str) -> None:
    run = Run()
    verdicts: list[bool] = []
    for _ in range(3):
        run.generation()
        run.fails(cause)
        verdicts.append(bool(run.exhausted))

    assert verdicts == [False, False, True]


def test_a_program_that_fails_between_checkpoints_never_runs_out() -> None:
    run = Run()
    for number in range(1, 60):
        run.generation(saved=number * 10)
        run.fails("RankFailed")
        assert not run.exhausted


def test_saving_the_same_step_again_and_again_is_no_progress() -> None:
    run = Run()
    for _ in range(4):
        run.generation(saved=10)
        run.fails("CheckpointRejected")

    assert run.exhausted


def test_lost_workers_cost_restarts_only() -> None:
    run = Run(recovery(budget={"restarts": 5, "withoutProgress": 1}))
    verdicts: list[bool] = []
    for _ in range(6):
        run.generation()
        run.fails("WorkerLost")
        verdicts.append(bool(run.exhausted))

    assert verdicts == [False] * 5 + [True]


def test_restarts_are_counted_within_the_window_only() -> None:
    run = Run(recovery(budget={"restarts": 3, "window": "1m"}))
    for _ in range(20):
        run.generation()
        run.fails("WorkerLost", seconds=30.0)
        assert not run.exhausted


def test_a_broken_collective_of_workers_that_are_all_there_is_the_programs_failure() -> None:
    run = Run(recovery(budget={"withoutProgress": 1}))
    run.generation()
    run.fails("RankFailed", a_failure(reason="CollectiveError", exit_code=75))
    assert not run.exhausted

    run.generation()

    assert run.exhausted


def test_a_broken_collective_after_which_a_worker_is_missing_is_a_lost_worker() -> None:
    run = Run(recovery(budget={"withoutProgress": 1}))
    run.generation()
    run.fails("RankFailed", a_failure(reason="CollectiveError", exit_code=75))

    run.generation(lost=1)

    assert not run.exhausted


def test_the_message_names_the_counts_and_the_last_failure() -> None:
    run = Run(recovery(budget={"withoutProgress": 1}))
    run.generation()
    run.fails("RankFailed", a_failure(message="out of cheese"))

    assert "failed 1 times in a row" in run.exhausted
    assert "out of cheese" in run.exhausted


@pytest.mark.parametrize(
    "condition",
    [{"onExitCodes": [70, 9]}, {"onReason": "OutOfMemory"}, {"onLog": "CUDA.*memory"}],
    ids=["exit code", "reason", "log"],
)
def test_a_rule_that_says_fail_ends_the_job_at_the_first_failure(condition: dict[str, Any]) -> None:
    run = Run(recovery(rules=[condition | {"action": "Fail"}]))
    run.generation()
    run.fails("RankFailed", a_failure(reason="OutOfMemory", exit_code=70, message="CUDA out of memory"))

    assert "exit code 70 (OutOfMemory): CUDA out of memory" in run.ledger.view().fatal


def test_a_rule_that_does_not_match_changes_nothing() -> None:
    run = Run(recovery(rules=[{"onExitCodes": [70], "action": "Fail"}]))
    run.generation()
    run.fails("RankFailed", a_failure())

    assert not run.ledger.view().fatal


def test_ignored_failures_do_not_count_even_when_the_others_saw_a_broken_collective() -> None:
    run = Run(recovery(rules=[{"onReason": "Preempted", "action": "Ignore"}]))
    for _ in range(30):
        run.generation()
        run.fails("RankFailed", a_failure(reason="CollectiveError"), a_failure(reason="Preempted"))

    assert not run.exhausted


def test_the_first_rule_that_matches_wins() -> None:
    rules = [{"onReason": "Error", "action": "Restart"}, {"onLog": "boom", "action": "Fail"}]
    run = Run(recovery(rules=rules))
    run.generation()
    run.fails("RankFailed", a_failure())

    assert not run.ledger.view().fatal


def test_intended_ends_cost_nothing() -> None:
    run = Run()
    for _ in range(30):
        run.generation()
        run.fails("Resized")

    assert run.ledger.view().spent.restarts == ()


def test_pods_that_never_join_use_up_the_restarts() -> None:
    ledger, rules = a_ledger(), recovery(budget={"restarts": 2})
    ledger.record(StartsFailed(NOON, 3, "image is missing"), rules)

    assert "image is missing" in ledger.view().spent.exhausted(rules.budget, NOON)


def test_a_replacement_that_cannot_start_does_not_end_a_job_that_trains() -> None:
    run = Run()
    run.generation(saved=1)

    run.tell(StartsFailed(NOON, 100, "image is missing"))

    assert not run.exhausted


def test_what_is_spent_survives_a_restart_of_the_operator() -> None:
    run = Run()
    for _ in range(3):
        run.generation()
        run.fails("RankFailed")

    status = JobStatus.from_json(run.ledger.status().to_json())

    assert Ledger(status).view().spent == run.ledger.view().spent


def test_delays_double_up_to_a_limit() -> None:
    assert [restart_delay(failures) for failures in (0, 1, 2, 3, 4)] == [0, 0, 1, 2, 4]
    assert restart_delay(10_000) == 300


def test_falling_back_from_one_checkpoint_after_another_is_free() -> None:
    run = Run()
    for number in range(20):
        run.generation()
        for rank in range(3):
            run.tell(said(0, run.number, CheckpointRejected(checkpoint=f"c{number}", message=f"rank {rank}")))
        run.fails("CheckpointRejected")

    assert run.ledger.view().spent.restarts == ()
    assert len(run.ledger.status().incidents) == 20


def test_rejecting_the_same_checkpoint_again_and_again_is_a_failure_of_the_program() -> None:
    run = Run()
    for _ in range(4):
        run.generation()
        run.tell(said(0, run.number, CheckpointRejected(checkpoint="c", message="digest mismatch")))
        run.fails("CheckpointRejected")

    assert run.exhausted
