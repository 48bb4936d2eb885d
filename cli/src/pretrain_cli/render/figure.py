"""Figure of a run: training and validation loss, the unigram loss, and the number of workers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pretrain_api.status.records import EvaluationRecord, StepRecord
from pretrain_api.status.report import RunReport

CURVE = "#2563eb"
REDONE = "#f59e0b"
INCIDENT = "#dc2626"
SKIPPED = "#a855f7"
MUTED = "#6b7280"
SMOOTHING = 0.8


def draw_png(
    path: Path, report: RunReport, records: tuple[StepRecord, ...], evaluations: Sequence[EvaluationRecord] = ()
) -> None:
    """Draw the run as a PNG of 1,500 x 900 pixels."""
    draw(report, records, evaluations).savefig(path, dpi=150)


def draw_svg(report: RunReport, records: tuple[StepRecord, ...], evaluations: Sequence[EvaluationRecord] = ()) -> str:
    """Draw the run as one `<svg>` element; its loss curve has the id `loss-curve`."""
    buffer = io.StringIO()
    draw(report, records, evaluations).savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def draw(report: RunReport, records: tuple[StepRecord, ...], evaluations: Sequence[EvaluationRecord] = ()) -> Figure:
    """Draw loss above and workers below, with incidents as lines and skipped data as bands."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    loss, workers = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    figure.suptitle(f"{report.job}: {report.result.lower()} after {report.steps:,} steps", fontweight="bold")
    _draw_loss(loss, report, records, evaluations)
    _draw_workers(workers, records)
    for gap in report.skipped:
        for axes in (loss, workers):
            axes.axvspan(gap.first - 0.5, gap.last + 0.5, color=SKIPPED, alpha=0.12, linewidth=0, gid="skipped-data")
    for incident in report.incidents:
        for axes in (loss, workers):
            axes.axvline(incident.step, color=INCIDENT, linewidth=1, linestyle=":", alpha=0.8)
        label = f" {incident.cause}"
        if incident.action == "RolledBack":
            label += ", rolled back"
        if incident.resumed_seconds is not None:
            label += f", resumed in {incident.resumed_seconds:.2f} s"
        loss.annotate(
            label, (incident.step, 0.97), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right",
            fontsize=7, color=INCIDENT,
        )  # fmt: skip
    for axes in (loss, workers):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    return figure


def _draw_loss(
    axes: Axes, report: RunReport, records: tuple[StepRecord, ...], evaluations: Sequence[EvaluationRecord]
) -> None:
    final = {record.step: record for record in records}
    steps = sorted(final)
    losses = [final[step].loss for step in steps]
    axes.plot(steps, losses, color=CURVE, alpha=0.25, linewidth=0.8)
    (curve,) = axes.plot(steps, _smoothed(losses), color=CURVE, linewidth=1.8, label="training loss (smoothed)")
    curve.set_gid("loss-curve")
    redone = [record for record in records if record.generation != final[record.step].generation]
    if redone:
        axes.plot(
            [record.step for record in redone], [record.loss for record in redone],
            ".", color=REDONE, markersize=4, label="steps repeated after a fault",
        )  # fmt: skip
    if report.skipped:
        axes.fill_between([], [], color=SKIPPED, alpha=0.12, linewidth=0, label="data skipped after a rollback")
    if report.unigram_loss is not None:
        axes.axhline(report.unigram_loss, color=MUTED, linestyle="--", linewidth=1, label="unigram model")
    for (source, value), marker in zip(sorted(report.validation_loss.items()), "osD^v<>", strict=False):
        known = {record.step: record.losses[source] for record in evaluations if source in record.losses}
        steps, losses = zip(*sorted((known or {report.steps: value}).items()), strict=True)
        axes.plot(steps, losses, marker, markersize=4, label=f"validation: {source}", linestyle="none")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(loc="upper right", fontsize=8, frameon=False)


def _draw_workers(axes: Axes, records: tuple[StepRecord, ...]) -> None:
    final = {record.step: record for record in records}
    steps = sorted(final)
    axes.step(steps, [final[step].workers for step in steps], where="post", color=MUTED, linewidth=1.5)
    axes.set_ylim(0, 1.25 * max((record.workers for record in records), default=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("workers")
    axes.set_xlabel("step")


def _smoothed(values: list[float]) -> list[float]:
    """Compute a bias-corrected exponential moving average."""
    smoothed: list[float] = []
    mean = weight = 0.0
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(mean / weight)
    return smoothed
