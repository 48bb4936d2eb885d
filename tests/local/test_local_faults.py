"""Whole runs with faults: whatever is killed, the losses are those of a run in which nothing was."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from support.worlds.local import STEPS, TOLERANCE, Baseline, Finished, Run, run

ENDLESS = ("--set", "training.steps=100000")


def run_until(job: Path, out: Path, line: str, *arguments: str) -> Finished:
    """Run with no end in sight until it says the line and has trained a little on, then stop it as a user does."""
    with Run(job, out, *ENDLESS, *arguments) as started:
        started.until_line(lambda said: line in said)
        started.until_line(lambda said: "CheckpointSaved" in said)
        started.process.send_signal(signal.SIGINT)
        finished = started.finish()
    assert finished.code == 130, finished.explain()
    return finished


def trained_steps(finished: Finished) -> list[int]:
    return [record.step for record in finished.metrics]


def test_killed_processes_change_no_loss(job: Path, baseline: Baseline, tmp_path: Path) -> None:
    faults = ("kill:rank=2,step=35", "kill:agent=1,step=70", "kill:worker=2,step=115")

    finished = run(job, tmp_path, *(f"--fault={fault}" for fault in faults))

    assert finished.code == 0, finished.explain()
    assert len(finished.losses) == STEPS
    assert baseline.difference(finished.losses) < TOLERANCE
    incidents = finished.report.incidents
    assert [incident.worker for incident in incidents] == [2, 1, 2], finished.explain()
    for incident in incidents:
        assert incident.resumed_seconds is not None
        assert incident.steps_lost is not None
        assert incident.steps_lost <= 40, "at most an interval, and what was done while the last save was under way"


def test_rank_zero_lost_and_replaced_changes_no_loss(job: Path, baseline: Baseline, tmp_path: Path) -> None:
    finished = run_until(job, tmp_path, "generation 3 with 3 workers", "--fault", "kill:worker=0,step=50")

    assert [generation.workers for generation in finished.report.generations] == [3, 2, 3], finished.explain()
    assert baseline.difference(finished.losses) < TOLERANCE


def test_a_killed_coordinator_disturbs_no_worker(job: Path, baseline: Baseline, tmp_path: Path) -> None:
    finished = run(job, tmp_path, "--fault", "kill:coordinator,step=40", "--fault", "kill:coordinator,step=100")

    assert finished.code == 0, finished.explain()
    assert trained_steps(finished) == list(range(1, STEPS + 1))
    assert finished.report.incidents == ()
    assert [generation.number for generation in finished.report.generations] == [1]
    assert baseline.difference(finished.losses) < TOLERANCE


def test_a_stopped_worker_is_detected_and_replaced(job: Path, baseline: Baseline, tmp_path: Path) -> None:
    finished = run_until(job, tmp_path, "generation 3 with 3 workers", "--fault", "stop:worker=1,step=50")

    (incident,) = finished.report.incidents
    assert (incident.worker, incident.cause) == (1, "WorkerSilent"), finished.explain()
    assert [generation.workers for generation in finished.report.generations] == [3, 2, 3]
    assert baseline.difference(finished.losses) < TOLERANCE


def test_a_terminated_worker_costs_no_step(job: Path, baseline: Baseline, tmp_path: Path) -> None:
    finished = run(job, tmp_path, "--fault", "term:worker=1,step=50")

    assert finished.code == 0, finished.explain()
    assert trained_steps(finished) == list(range(1, STEPS + 1)), finished.explain()
    assert finished.report.incidents == ()
    assert baseline.difference(finished.losses) < TOLERANCE


def test_four_three_and_five_workers_train_alike(job: Path, baseline: Baseline, tmp_path: Path) -> None:
    faults = ("remove:worker,step=30", "add:worker,step=60", "add:worker,step=60")

    finished = run_until(job, tmp_path, "with 5 workers", "--workers", "4", *(f"--fault={fault}" for fault in faults))

    sizes = [generation.workers for generation in finished.report.generations]
    assert (sizes[:2], sizes[-1]) == ([4, 3], 5), finished.explain()
    assert trained_steps(finished) == list(range(1, len(finished.losses) + 1)), "a resize costs no step"
    assert finished.report.incidents == ()
    assert baseline.difference(finished.losses) < TOLERANCE


EXACT = ("--set", "training.exact=true", "--set", "training.model.dropout=0.1")


@pytest.fixture(scope="module")
def alone(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Finished]:
    """The exact job by one worker, undisturbed, up to a step."""
    out = tmp_path_factory.mktemp("alone")
    return lambda steps: run(job, out, *EXACT, "--workers", "1", "--set", f"training.steps={steps}")


def test_an_exact_run_of_shards_is_bit_equal_to_one_worker(
    job: Path, alone: Callable[[int], Finished], tmp_path: Path
) -> None:
    sharded = ("--set", "training.parallelism.shard=full", "--set", "training.steps=40")

    disturbed, undisturbed = run(job, tmp_path, *EXACT, *sharded, "--fault", "kill:worker=0,step=25"), alone(40)

    assert (disturbed.code, undisturbed.code) == (0, 0), disturbed.explain()
    assert [incident.cause for incident in disturbed.report.incidents] == ["WorkerLost"]
    assert disturbed.losses == undisturbed.losses
    assert disturbed.report.validation_loss == undisturbed.report.validation_loss
    assert disturbed.parameters() == undisturbed.parameters()


def test_an_exact_run_is_bit_equal_whatever_happens_to_its_workers(
    job: Path, alone: Callable[[int], Finished], tmp_path: Path
) -> None:
    resized = ("remove:worker,step=30", "kill:worker=0,step=50", "add:worker,step=90", "add:worker,step=90")

    disturbed = run_until(
        job, tmp_path, "with 5 workers", *EXACT, "--workers", "4", *(f"--fault={fault}" for fault in resized)
    )
    undisturbed = alone(len(disturbed.losses))

    sizes = [generation.workers for generation in disturbed.report.generations]
    assert (sizes[:2], 2 in sizes, sizes[-1]) == ([4, 3], True, 5), disturbed.explain()
    assert disturbed.losses == undisturbed.losses
    assert disturbed.parameters() == undisturbed.parameters()
