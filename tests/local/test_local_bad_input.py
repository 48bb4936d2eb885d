"""Bad input ends before anything starts: exit code 2, one sentence, nothing written over."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from pretrain_cli.app import main
from pretrain_operator.local.run_folder import RunFolder


def run(job: Path, out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["run", str(job), "--out", str(out), *arguments])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--set", "training.batch.microBatch=0"), "microBatch"),
        (("--set", "training.batch.microbatch=4"), "microbatch"),
        (("--set", "workers.elastic.min=9"), "min (9) is greater than max (5)"),
        (("--set", "training.data.tokenizer=nowhere.json"), "spec.training.data.tokenizer"),
        (("--set", "training.data.sources[0].uri=nowhere"), "spec.training.data.sources[0].uri"),
        (("--fault", "kill:worker=7,step=10"), "--fault kill:worker=7,step=10: there is no worker 7 at that step"),
        (("--fault", "kill:worker=1"), "write ACTION:TARGET=N,step=S"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    job: Path, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    finished = run(job, tmp_path / "out", *arguments)

    assert finished.exit_code == 2, finished.stderr
    assert sentence in finished.stderr
    assert len(finished.stderr.splitlines()) == 1, finished.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_job_file_is_named(tmp_path: Path) -> None:
    finished = run(tmp_path / "nowhere.yaml", tmp_path / "out")

    assert finished.exit_code == 2
    assert "nowhere.yaml" in finished.stderr


@pytest.mark.bare
def test_a_folder_of_another_job_is_refused_and_left_alone(job: Path, tmp_path: Path) -> None:
    kept = "metadata: {name: other}\n"
    (tmp_path / "job.yaml").write_text(kept)

    finished = run(job, tmp_path)

    assert finished.exit_code == 2
    assert "holds a run of the job 'other', not of 'tiny'; choose another --out" in finished.stderr
    assert (tmp_path / "job.yaml").read_text() == kept
    assert not (tmp_path / "status.json").exists()


def test_a_folder_in_use_is_refused(job: Path, tmp_path: Path) -> None:
    with RunFolder(tmp_path):
        finished = run(job, tmp_path)

    assert finished.exit_code == 2
    assert "another `pretrain run` uses this folder" in finished.stderr
