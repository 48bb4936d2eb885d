"""What people see of a run: the live view, the lines, the summary."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from pretrain_api.checkpoint.lineage import manifest_key
from pretrain_api.estimate.throughput import StepRate
from pretrain_api.status.job import CheckpointSummary, Goodput, Incident, JobStatus, WorkerStatus
from pretrain_api.status.records import EvaluationRecord, SampleRecord, StepRecord
from pretrain_api.status.report import RunReport
from pretrain_cli.render.line_log import LineLog
from pretrain_cli.render.sparkline import sparkline
from pretrain_cli.render.summary import summarise
from pretrain_cli.render.terminal import TerminalView
from pretrain_operator.cluster import Event

INCIDENT = Incident(
    cause="WorkerLost", worker=1, node="local-1", step=60, detected_seconds=0.012, resumed_seconds=0.31, steps_lost=4
)


def a_record(step: int, loss: float = 4.5) -> StepRecord:
    return StepRecord(
        step=step, loss=loss, grad_norm=1.0, learning_rate=1e-3, tokens=step * 3072, tokens_per_second=18_700.0,
        generation=1, workers=3, time=1000.0 + step * 0.1,
    )  # fmt: skip


def a_status() -> JobStatus:
    return JobStatus(
        phase="Training",
        generation=2,
        step=120,
        total_steps=685,
        unigram_loss=6.43,
        goodput=Goodput(ratio=0.953, seconds={"training": 95.3, "starting": 4.7}),
        latest_checkpoint=manifest_key(2, 100),
        workers=tuple(
            WorkerStatus(
                slot=slot, attempt=0, state="Training", rank=slot, node=f"local-{slot}", pids={slot: 4242 + slot}
            )
            for slot in range(3)
        ),
        incidents=(INCIDENT,),
    )


def drawn(width: int, steps: int = 120) -> str:
    console = Console(width=width, height=40, file=io.StringIO(), force_terminal=True, color_system=None)
    terminal = TerminalView(console, lambda: 0.0, "quickstart", 685)
    terminal.status(a_status())
    for step in range(1, steps + 1):
        terminal.step(a_record(step, loss=7.0 - step / 60))
    terminal.event(Event("Warning", "WorkerLost", "WorkerLost (worker 1) ended generation 1 at step 60: " + "x" * 200))
    console.print(terminal.render())
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_view_fits_the_terminal_and_shows_what_matters(width: int) -> None:
    text = drawn(width)

    assert max(len(line) for line in text.splitlines()) <= width
    for shown in ("quickstart", "120 of 685", "18%", "5.0000", "18,700 tokens/s", "step 100", "0.31 s", "WorkerLost"):
        assert shown in text
    assert text.count("Training") == 3


def test_the_view_stands_before_anything_is_known() -> None:
    console = Console(width=80, file=io.StringIO(), force_terminal=True)
    TerminalView(console, lambda: 0.0, "quickstart", 685).render()


def test_workers_and_incidents_stand_side_by_side_where_there_is_room() -> None:
    both = [line for line in drawn(140).splitlines() if "detected" in line]
    assert "worker " in both[0]
    assert "attempt" in both[0]
    assert "attempt" not in next(line for line in drawn(80).splitlines() if "detected" in line)


def test_lines_come_every_two_seconds_and_for_the_last_step() -> None:
    now = [0.0]
    out = io.StringIO()
    log = LineLog(out, lambda: now[0], total_steps=100)

    for step in range(1, 101):
        log.step(a_record(step))
        now[0] += 0.125

    steps = [line.split("step")[1].split("/")[0].strip() for line in out.getvalue().splitlines()]
    assert steps == ["1", "17", "33", "49", "65", "81", "97", "100"]


def test_every_event_is_a_line() -> None:
    out = io.StringIO()
    log = LineLog(out, lambda: 0.0, total_steps=100)

    log.event(Event("Normal", "CheckpointSaved", "checkpoint of step 50 in 0.20 s"))
    log.event(Event("Warning", "WorkerLost", "worker 1"))

    lines = [line.split(" ", 1)[1] for line in out.getvalue().splitlines()]
    assert lines == ["CheckpointSaved: checkpoint of step 50 in 0.20 s", "WARNING WorkerLost: worker 1"]


def test_evaluations_and_texts_are_a_line_each_and_the_newest_stand_in_the_view() -> None:
    out = io.StringIO()
    log = LineLog(out, lambda: 0.0, total_steps=100)
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    terminal = TerminalView(console, lambda: 0.0, "quickstart", 685)

    for record in (an_evaluation(50), a_sample(50, "old"), a_sample(100, "to be\nor not " + "to be " * 100)):
        log.evaluation(record)
        terminal.evaluation(record)

    lines = [line.split(" ", 1)[1] for line in out.getvalue().splitlines()]
    assert lines[:2] == ["evaluation after step 50: held-out 4.5000", "sample after step 50: the old"]
    assert lines[2].startswith("sample after step 100: the to be or not to be to")
    assert lines[2].endswith("…")
    console.print(terminal.render())
    view = console.file.getvalue()
    assert "evaluation after 50  held-out 4.5000" in view
    assert "sample after 100  the to be or not to be" in view
    assert max(len(line) for line in view.splitlines()) <= 80


def an_evaluation(step: int) -> EvaluationRecord:
    return EvaluationRecord(step=step, losses={"held-out": 4.5}, seconds=0.1, generation=1, time=0.0)


def a_sample(step: int, text: str) -> SampleRecord:
    return SampleRecord(step=step, prompt="the ", text=text, generation=1, time=0.0)


def test_the_time_left_follows_the_steps_done() -> None:
    rate = StepRate()
    assert rate.remaining(100) is None

    for step in range(1, 51):
        rate.add(step, a_record(step).time)

    remaining = rate.remaining(100)
    assert remaining is not None
    assert remaining.total_seconds() == 5


def test_there_is_no_time_left_to_tell_after_a_rollback() -> None:
    rate = StepRate()

    for step in (60, 50):
        rate.add(step, a_record(step).time)

    assert rate.remaining(100) is None


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 8, ""),
        ([1.0], 8, "▁"),
        ([3.0, 2.0, 1.0], 8, "█▅▁"),
        ([4.0, 4.0, 1.0, 1.0], 2, "█▁"),
        ([float("nan"), 1.0, 2.0], 8, "▁█"),
        ([1.0, 2.0], 0, ""),
    ],
)
def test_a_curve_in_a_line(values: list[float], width: int, line: str) -> None:
    assert sparkline(values, width) == line


def test_the_summary_says_what_was_reached_and_what_happened() -> None:
    report = RunReport(
        job="quickstart", result="Succeeded", reason="Completed", steps=685, tokens=2_104_320, final_loss=3.751,
        unigram_loss=6.43, validation_loss={"prose": 3.9}, tokens_per_second=18_700.0, wall_seconds=75.0,
        goodput=Goodput(ratio=0.953, seconds={"training": 95.3, "starting": 4.7}), generations=(),
        incidents=(INCIDENT,), checkpoints=CheckpointSummary(saved=14, latest_step=685, stall_seconds=0.1),
    )  # fmt: skip

    text = summarise(report, JobStatus(total_steps=685, sample="def main():\n    return"), Path("runs/quickstart"))

    for shown in (
        "quickstart: Succeeded",
        "685 of 685",
        "3.751 nats per token, unigram model 6.430, validation prose 3.900",
        "18,700 tokens/s",
        "95.3% of 100 s",
        "WorkerLost of worker 1 after step 60: resumed 0.31 s after the fault, 4 steps lost",
        "runs/quickstart/report.html",
        "  def main():",
    ):
        assert shown in text
