"""How runs end and go on: Ctrl-C, again, and what is left behind."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil

from support.worlds.local import STEPS, TOLERANCE, Baseline, Run, run


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_a_stopped_run_goes_on_by_the_same_command(job: Path, baseline: Baseline, tmp_path: Path) -> None:
    with Run(job, tmp_path) as started:
        started.until_line(lambda line: "checkpoint of step 40" in line)
        below = started.below()
        started.process.send_signal(signal.SIGINT)
        stopped = started.finish()

    assert stopped.code == 130, stopped.explain()
    assert f"to resume from step {len(stopped.losses)}." in stopped.stdout
    assert stopped.report.result == "Stopped"
    assert stopped.report.checkpoints.latest_step == len(stopped.losses) < STEPS
    psutil.wait_procs(below, timeout=10)
    assert not alive(below)

    resumed = run(job, tmp_path)

    assert resumed.code == 0, resumed.explain()
    assert [record.step for record in resumed.metrics] == list(range(1, STEPS + 1)), "no step is done twice"
    assert baseline.difference(resumed.losses) < TOLERANCE


def test_a_second_signal_ends_at_once(job: Path, tmp_path: Path) -> None:
    with Run(job, tmp_path, "--set", "training.steps=100000") as started:
        started.until_line(lambda line: "checkpoint of step 20" in line)
        below = started.below()
        operator = next(process for process in below if "pretrain_operator.local" in process.cmdline())
        operator.suspend()  # so that the first one can't be done with before the second comes
        started.process.send_signal(signal.SIGTERM)
        started.until_line(lambda line: "Stopping" in line)
        started.process.send_signal(signal.SIGINT)
        stopped = started.finish()

    assert stopped.code == 130, stopped.explain()
    assert "Stopped without a report. Run the same command" in stopped.stdout
    psutil.wait_procs(below, timeout=10)
    assert not alive(below)


def test_a_killed_run_leaves_no_process_and_goes_on_by_the_same_command(
    job: Path, baseline: Baseline, tmp_path: Path
) -> None:
    with Run(job, tmp_path) as started:
        started.until_line(lambda line: "checkpoint of step 40" in line)
        below = started.below()
        started.process.kill()
        started.finish()
    psutil.wait_procs(below, timeout=10)
    assert not alive(below)

    resumed = run(job, tmp_path)

    assert resumed.code == 0, resumed.explain()
    assert baseline.difference(resumed.losses) < TOLERANCE


def test_a_finished_run_says_so_and_goes_on_for_more_steps(job: Path, baseline: Baseline, tmp_path: Path) -> None:
    assert run(job, tmp_path, "--set", "training.steps=30").code == 0
    (tmp_path / "report.html").unlink()

    again = run(job, tmp_path, "--set", "training.steps=30")
    longer = run(job, tmp_path, "--set", "training.steps=50")

    assert again.code == 0
    assert "has already done its 30 steps" in again.stdout
    assert (tmp_path / "report.html").exists()
    assert longer.code == 0, longer.explain()
    assert len(longer.losses) == 50
    assert baseline.difference(longer.losses) < TOLERANCE
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file() and not path.name.startswith(".")) == [
        "evaluations.jsonl", "job.yaml", "loss.png", "metrics.jsonl", "report.html", "report.json", "samples.jsonl",
        "status.json", "trainer.json",
    ]  # fmt: skip
