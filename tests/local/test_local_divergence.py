"""A whole run over poisoned data: what its files, its report and its lines say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pretrain_api.checkpoint.lineage import StepRange
from support.trainer.poison import STEPS, a_poisoned_corpus
from support.worlds.local import run

SKIPPED = StepRange(first=36, last=51)
NAN_AT = 33


def test_a_rollback_is_seen_by_whoever_looks(tmp_path: Path) -> None:
    job = a_poisoned_corpus(tmp_path) / "job.yaml"

    finished = run(job, tmp_path / "out")

    assert finished.code == 0, finished.explain()
    report = finished.report
    (incident,) = report.incidents
    assert (incident.cause, incident.action, incident.worker) == ("LossSpike", "RolledBack", None)
    assert incident.steps_lost is not None
    assert incident.steps_lost > 0
    assert incident.resumed_seconds is not None
    assert (report.skipped, report.rollbacks) == ((SKIPPED,), 1)
    assert [(item.number, item.started_at_step, item.reason) for item in report.generations] == [
        (1, 0, "Started"),
        (2, 30, "RolledBack"),
    ]
    twice = [record.step for record in finished.metrics if record.generation == 1 and record.step > 30]
    assert twice
    assert [record.step for record in finished.metrics if record.generation == 2] == list(range(31, STEPS + 1))
    assert 'id="skipped-data"' in (finished.out / "report.html").read_text()
    for said in ("WARNING LossSpike: step ", "WARNING RolledBack: generation 2 resumes from step 30", "rollbacks    1"):
        assert said in finished.stdout


@pytest.mark.parametrize("exact", ["false", "true"])
def test_an_injected_nan_is_gone_back_from_and_its_data_passed_over(tmp_path: Path, exact: str) -> None:
    job = a_poisoned_corpus(tmp_path) / "job.yaml"
    job.write_text(job.read_text().replace("uri: poisoned", "uri: clean"))

    finished = run(job, tmp_path / "out", "--fault", f"nan:step={NAN_AT}", "--set", f"training.exact={exact}")

    assert finished.code == 0, finished.explain()
    (incident,) = finished.report.incidents
    assert (incident.cause, incident.action, incident.step) == ("LossNotFinite", "RolledBack", NAN_AT - 1)
    assert finished.report.skipped == (StepRange(first=31, last=46),), "from the checkpoint of step 30 on"
    assert [(item.number, item.started_at_step) for item in finished.report.generations] == [(1, 0), (2, 30)]
    assert [record.step for record in finished.metrics if record.generation == 2] == list(range(31, STEPS + 1))
    assert all(math.isfinite(record.loss) for record in finished.metrics)
    assert finished.report.final_loss is not None
    assert finished.report.final_loss < 0.7 * finished.metrics[0].loss
    assert f"WARNING FaultInjected: nan:step={NAN_AT}" in finished.stdout
