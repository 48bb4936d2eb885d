"""Report of a run: `report.json`, `loss.png` and a self-contained `report.html`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal, TypeVar

import jinja2

from pretrain_api.base import Frozen
from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import Goodput, JobStatus
from pretrain_api.status.records import EvaluationRecord, SampleRecord, StepRecord, perplexity
from pretrain_api.status.report import RunReport
from pretrain_cli.render.figure import draw_png, draw_svg
from pretrain_cli.render.step_times import NAMES, draw_step_parts, mean_parts

FINAL_STEPS = 20
SHOWN_SAMPLES = 6
"""Number of latest samples in the report."""
SHOWN_EVALUATIONS = 20
"""Number of latest evaluations in the report."""

Result = Literal["Succeeded", "Failed", "Stopped"]
Record = TypeVar("Record", bound=Frozen)


@dataclass(frozen=True)
class ModelEvaluations:
    """Evaluations and samples of a run; the last result of a repeated step counts."""

    evaluations: tuple[EvaluationRecord, ...] = ()
    samples: tuple[SampleRecord, ...] = ()


def write_outputs(
    out: Path, job: PretrainJob, status: JobStatus, wall_seconds: float, result: Result, reason: str
) -> RunReport:
    """Write the three files to `out` from its `metrics.jsonl` and the last status; return the report."""
    records = read_metrics(out / "metrics.jsonl")
    final = final_history(records)
    report = RunReport(
        job=job.metadata.name,
        result=result,
        reason=reason,
        steps=status.step,
        tokens=status.tokens,
        final_loss=fmean(record.loss for record in final[-FINAL_STEPS:]) if final else None,
        unigram_loss=status.unigram_loss,
        validation_loss=status.validation_loss,
        evaluation_metrics=status.evaluation_metrics,
        tokens_per_second=status.tokens_per_second,
        tokens_per_second_per_device=status.tokens_per_second_per_device,
        mfu=status.mfu,
        step_seconds=mean_parts(final),
        wall_seconds=wall_seconds,
        goodput=status.goodput or Goodput(ratio=0.0, seconds={}),
        generations=status.generations,
        incidents=status.incidents,
        checkpoints=status.checkpoints,
        skipped=status.skipped,
        rollbacks=status.rollbacks,
    )
    (out / "report.json").write_text(report.model_dump_json(indent=1) + "\n")
    evaluations = {record.step: record for record in read_lines(out / "evaluations.jsonl", EvaluationRecord)}
    samples = {(record.step, record.number): record for record in read_lines(out / "samples.jsonl", SampleRecord)}
    results = ModelEvaluations(tuple(evaluations.values()), tuple(samples.values()))
    draw_png(out / "loss.png", report, records, results.evaluations)
    (out / "report.html").write_text(render_html(report, records, status, results), encoding="utf-8")
    return report


def read_metrics(path: Path) -> tuple[StepRecord, ...]:
    """Read `metrics.jsonl`; an incomplete last line is ignored."""
    return read_lines(path, StepRecord)


def read_lines(path: Path, kind: type[Record]) -> tuple[Record, ...]:
    """Read the records of a JSON lines file; an incomplete last line is ignored."""
    if not path.exists():
        return ()
    lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: texts contain other separators
    return tuple(kind.from_json(line) for line in lines[:-1])


def final_history(records: tuple[StepRecord, ...]) -> tuple[StepRecord, ...]:
    """Keep the last record of each step, in order."""
    last = {record.step: record for record in records}
    return tuple(last[step] for step in sorted(last))


def render_html(
    report: RunReport, records: tuple[StepRecord, ...], status: JobStatus, results: ModelEvaluations
) -> str:
    """Render the page: numbers, curves, incidents, generations, goodput and samples, all inline."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pretrain_cli"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["seconds"] = lambda value: "–" if value is None else f"{value:.2f} s"
    environment.filters["share"] = lambda value: "–" if value is None else f"{value:.1%}"
    environment.filters["milliseconds"] = lambda value: f"{1000 * value:.1f} ms"
    environment.filters["loss"] = lambda value: "–" if value is None else f"{value:.3f}"
    environment.filters["perplexity"] = lambda value: f"{perplexity(value):.4g}"
    total = sum(report.goodput.seconds.values()) or 1.0
    shares = [
        (state, seconds, seconds / total)
        for state, seconds in sorted(report.goodput.seconds.items(), key=lambda item: -item[1])
        if seconds > 0
    ]
    return environment.get_template("report.html.j2").render(
        report=report,
        status=status,
        figure=draw_svg(report, records, results.evaluations),
        samples=results.samples[-SHOWN_SAMPLES:],
        evaluations=results.evaluations[-SHOWN_EVALUATIONS:],
        metric_names=sorted({name for record in results.evaluations for name in record.metrics}),
        shares=shares,
        split=draw_step_parts(final_history(records)),
        step_total=sum(report.step_seconds.values()) or 1.0,
        part_names=NAMES,
    )
