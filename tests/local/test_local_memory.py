"""Whole runs with states in memory: what is lost is an interval of these, and the losses are those of any other run."""

from __future__ import annotations

from pathlib import Path

from pretrain_store.directory import DirectoryStore
from pretrain_store.history import read_listing
from support.worlds.local import TOLERANCE, Baseline, run

EVERY = 5
MEMORY = ("--set", f"checkpoint.memory={{everySteps: {EVERY}}}", "--set", "checkpoint.interval={steps: 1000}")
SHORT = ("--set", "training.steps=50")


def test_failures_in_a_row_lose_an_interval_of_memory_and_no_loss_changes(
    job: Path, baseline: Baseline, tmp_path: Path
) -> None:
    """A worker, then a process, then an agent, before anybody has taken a place or the store has a checkpoint."""
    faults = ("kill:worker=0,step=12", "kill:rank=1,step=24", "kill:agent=2,step=36")

    finished = run(job, tmp_path, *MEMORY, *SHORT, *(f"--fault={fault}" for fault in faults))

    assert finished.code == 0, finished.explain()
    assert baseline.difference(finished.losses) < TOLERANCE
    incidents = finished.report.incidents
    assert len(incidents) == len(faults), finished.explain()
    for incident in incidents:
        assert incident.steps_lost is not None
        assert incident.steps_lost <= 2 * EVERY, finished.explain()  # the last state may not have been sealed yet
    records = read_listing(DirectoryStore(tmp_path / "checkpoints")).records.values()
    recovered = [record for record in records if record.reason in ("WorkerLost", "RankFailed")]
    assert len(recovered) == len(faults), finished.explain()
    assert all(record.resumed is not None for record in recovered)
