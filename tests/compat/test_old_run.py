"""A run that old code made and stopped: new code resumes it, from its folder and from a bucket, and reads it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.store.moto import Bucket, moto
from support.worlds.local import PRETRAIN, TOLERANCE, Finished, run
from support.worlds.old import FIXTURES, continued_losses, lost, old_agents

CONTINUED = continued_losses()
STEPS = ("--set", f"training.steps={max(CONTINUED)}")


def continued(finished: Finished) -> dict[int, float]:
    """The losses of the steps that the stopped run still had to do."""
    assert finished.code == 0, finished.explain()
    records = [record for record in finished.metrics if record.step in CONTINUED]
    assert [record.step for record in records] == list(CONTINUED), "each once"
    return {record.step: record.loss for record in records}


def as_before(before: Any, after: Any) -> bool:
    """Tell whether a list begins with its former items."""
    return after[: len(before)] == before


def test_a_stopped_run_resumes_from_its_step_with_the_same_losses(resumed: Finished) -> None:
    losses = continued(resumed)

    assert losses == pytest.approx(CONTINUED, rel=TOLERANCE), "as on the machine on which the old code continued it"


def test_a_resumed_run_keeps_its_history(stopped: Path, resumed: Finished) -> None:
    before = json.loads((stopped / "run" / "status.json").read_bytes())
    after = json.loads((resumed.out / "status.json").read_bytes())

    assert after["jobUid"] == before["jobUid"]
    assert after["generation"] == before["generation"] + 1
    assert len(after["generations"]) == len(before["generations"]) + 1
    assert after["phase"] == "Succeeded"
    for part in ("generations", "incidents", "skipped", "suspects"):
        assert as_before(before[part], after[part]), part
    for part in ("rollbacks", "parameters", "unigramLoss"):
        assert after[part] == before[part], part
    for state, seconds in before["goodput"]["seconds"].items():
        assert after["goodput"]["seconds"][state] >= seconds, state
    assert after["checkpoints"]["saved"] > before["checkpoints"]["saved"]
    for lines in ("metrics.jsonl", "evaluations.jsonl"):
        assert (resumed.out / lines).read_bytes().startswith((stopped / "run" / lines).read_bytes()), lines
    assert (resumed.report.rollbacks, len(resumed.report.incidents)) == (1, 2)


def test_a_bucket_resumes_in_a_new_folder_with_the_same_losses(
    stopped: Path, resumed: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(stopped / "run" / "checkpoints", tmp_path / "objects" / "tiny")
    with moto() as environ:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        bucket = Bucket(environ, "runs")
        bucket.create()
        bucket.upload(tmp_path / "objects")
        storage = f"{{s3: {{bucket: runs, prefix: tiny, endpoint: '{environ['AWS_ENDPOINT_URL']}'}}}}"

        finished = run(
            stopped / "job.yaml", tmp_path / "out", *STEPS, "--set", f"checkpoint.storage={storage}",
            "--set", "checkpoint.memory=null",
        )  # fmt: skip

    assert continued(finished) == continued(resumed)
    assert finished.status.generation == resumed.status.generation, "above the highest of the bucket's"


def test_old_agents_train_the_same_losses_under_a_new_operator_though_one_is_killed(
    stopped: Path, resumed: Finished, code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = old_agents(code, tmp_path / "shim")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    fault = f"kill:worker=1,step={min(CONTINUED) + 3}"
    finished = run(stopped / "job.yaml", stopped / "run", *STEPS, "--fault", fault)

    assert finished.code == 0, finished.explain()
    history = {record.step: record.loss for record in finished.metrics}
    assert {step: history[step] for step in CONTINUED} == continued(resumed)
    assert finished.report.incidents[-1].cause == "WorkerLost"
    assert "could not preload" not in finished.explain(), "the old code has what the new operator has it preload"
    ran = [path.read_text() for path in (tmp_path / "shim").glob("agent-*")]
    assert ran == [f"{code / 'pretrain_agent' / '__init__.py'} {code}"] * 3, "two, and one in the killed one's place"


def test_the_old_run_is_listed_verified_and_exported_as_by_the_old_code(stopped: Path, tmp_path: Path) -> None:
    wanted = json.loads((FIXTURES / "read.json").read_text())
    listed = json.loads(pretrain("checkpoints", str(stopped / "run"), "--verify", "--json"))
    pretrain("export", str(stopped / "run"), "--out", str(tmp_path / "export"))

    assert not lost(wanted["checkpoints"], listed["checkpoints"])
    assert not lost(wanted["rollbacks"], listed["rollbacks"])
    digests = {
        name: hashlib.sha256((tmp_path / "export" / name).read_bytes()).hexdigest() for name in wanted["digests"]
    }
    assert digests == wanted["digests"]


def pretrain(*arguments: str) -> str:
    """The output of a command that succeeds."""
    done = subprocess.run([PRETRAIN, *arguments], capture_output=True, text=True, env={**os.environ}, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
