"""The files that a run leaves to look at."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread

from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import Goodput, Incident, JobStatus
from pretrain_api.status.records import EvaluationRecord, SampleRecord, StepRecord, perplexity
from pretrain_api.status.report import RunReport
from pretrain_cli.render.figure import CURVE
from pretrain_cli.render.report import read_metrics, write_outputs
from pretrain_cli.render.summary import summarise

JOB = PretrainJob.model_validate(
    {
        "apiVersion": "pretrain.dev/v1alpha1",
        "kind": "PretrainJob",
        "metadata": {"name": "tiny"},
        "spec": {
            "training": {
                "model": {"preset": "gpt2-124m"},
                "data": {"tokenizer": "t.json", "sources": [{"name": "a", "uri": "a"}]},
                "steps": 100,
            },
            "checkpoint": {"storage": {"path": "checkpoints"}},
        },
    }
)


def a_record(step: int, loss: float, generation: int = 1) -> StepRecord:
    return StepRecord(
        step=step, loss=loss, grad_norm=1.0, learning_rate=1e-3, tokens=step * 64, tokens_per_second=100.0,
        generation=generation, workers=3, time=float(step),
    )  # fmt: skip


def a_status() -> JobStatus:
    return JobStatus(
        phase="Succeeded",
        step=100,
        tokens=6400,
        unigram_loss=6.1,
        validation_loss={"held-out": 4.5},
        goodput=Goodput(ratio=0.9, seconds={"training": 90.0, "recovering": 10.0}),
        incidents=(Incident(cause="WorkerLost", worker=1, step=60, detected_seconds=0.01, resumed_seconds=0.3),),
    )


def samples() -> list[SampleRecord]:
    """A text after every tenth step, of which the one after step 70 was written again."""
    places = [(step, 1) for step in range(10, 80, 10)] + [(step, 2) for step in range(70, 110, 10)]
    return [
        SampleRecord(
            step=step, prompt="def ", text=f"f(<script>alert({step}.{generation})</script>",
            generation=generation, time=float(step),
        )
        for step, generation in places
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    records = [a_record(step, 7 * math.exp(-step / 40)) for step in range(1, 71)]
    records += [a_record(step, 7 * math.exp(-step / 40) + 1, generation=2) for step in range(61, 101)]
    (tmp_path / "metrics.jsonl").write_text("".join(record.to_json() + "\n" for record in records))
    (tmp_path / "samples.jsonl").write_text("".join(record.to_json() + "\n" for record in samples()))
    evaluations = [
        EvaluationRecord(step=step, losses={"held-out": 5.0}, seconds=1, generation=1, time=1.0) for step in (50, 100)
    ]
    (tmp_path / "evaluations.jsonl").write_text("".join(record.to_json() + "\n" for record in evaluations))
    write_outputs(tmp_path, JOB, a_status(), 100.0, "Succeeded", "")
    return tmp_path


def test_the_final_loss_is_the_mean_of_the_last_20_steps_of_the_final_history(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())

    expected = sum(7 * math.exp(-step / 40) + 1 for step in range(81, 101)) / 20
    assert report["finalLoss"] == pytest.approx(expected)
    assert report["incidents"][0]["resumedSeconds"] == 0.3


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    line = a_record(1, 3.0).to_json() + "\n"
    (tmp_path / "metrics.jsonl").write_text(line + line[:20])

    assert [record.step for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_the_page_names_no_address_outside_itself_and_escapes_what_the_model_wrote(run: Path) -> None:
    page = (run / "report.html").read_text()

    fetched = re.findall(r"""(?:src|href|action)\s*=\s*["']?(?!#|data:)[^"'\s>]+|url\((?!#)|@import""", page)
    assert fetched == []
    assert "validation loss: held-out, perplexity 90.02" in page
    assert "<script>alert" not in page


def test_the_page_shows_the_last_texts_of_the_final_history_the_newest_first(run: Path) -> None:
    page = (run / "report.html").read_text()

    shown = re.findall(r"After step (\d+)</p><pre><b>def </b>f\(&lt;script&gt;alert\([\d]+\.(\d)\)", page)
    assert shown == [("100", "2"), ("90", "2"), ("80", "2"), ("70", "2"), ("60", "1"), ("50", "1")]


def test_a_run_without_a_step_still_gets_its_files(tmp_path: Path) -> None:
    report = write_outputs(tmp_path, JOB, JobStatus(phase="Failed"), 1.0, "Failed", "no quorum")

    assert report.final_loss is None
    assert "no quorum" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.mark.bare
def test_a_browser_shows_the_curve(chromium: Path, run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,1600",
    ]  # fmt: skip

    subprocess.run(
        [str(chromium), *options, f"--screenshot={picture}", (run / "report.html").as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip

    pixels = imread(picture)[:, :, :3]
    wanted = [int(CURVE[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    near = (abs(pixels - wanted) < 0.06).all(axis=2)
    columns = near[200:900].any(axis=0).sum()
    assert columns > 400, "the loss curve spans the page's width"


def test_the_summary_gives_the_perplexity_of_each_source(run: Path) -> None:
    report = RunReport.from_json((run / "report.json").read_bytes())

    assert "validation held-out 4.500 (perplexity 90.02)" in summarise(report, a_status(), run)
    assert perplexity(1e6) == math.inf
