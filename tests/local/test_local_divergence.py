"""A whole run over poisoned data: what its files, its report and its lines say."""

from __future__ import annotations

from pathlib import Path

from builders_local import run
from builders_poison import STEPS, a_poisoned_corpus

from pretrain_api.lineage import StepRange

SKIPPED = StepRange(first=36, last=51)


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
    for said in ("WARNING LossSpike: step ", "WARNING RolledBack: generation 2 goes on from step 30", "rollbacks    1"):
        assert said in finished.stdout
