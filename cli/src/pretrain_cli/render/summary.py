"""Summary that a run prints at its end."""

from __future__ import annotations

from pathlib import Path

from pretrain_api.status.job import Incident, JobStatus
from pretrain_api.status.records import perplexity
from pretrain_api.status.report import RunReport


def summarise(report: RunReport, status: JobStatus, out: Path) -> str:
    """Format the report in a few lines."""
    lines = [
        f"{report.job}: {report.result}" + ("" if report.result == "Succeeded" else f", {report.reason}"),
        f"  steps        {report.steps:,} of {status.total_steps:,}, {report.tokens:,} tokens",
        f"  loss         {_losses(report)}",
        *([f"  evaluation   {_metrics(report)}"] if report.evaluation_metrics else []),
        f"  speed        {_speed(report)}",
        f"  goodput      {report.goodput.ratio:.1%} of {sum(report.goodput.seconds.values()):.0f} s spent training",
        f"  checkpoints  {_checkpoints(report)}",
        *([f"  rollbacks    {_rollbacks(report)}"] if report.rollbacks else []),
        *(f"  incident     {_incident(incident)}" for incident in report.incidents),
        f"  files        {out}/report.html, report.json, loss.png, logs/, "
        "and metrics, evaluations and samples in .jsonl",
    ]
    if status.sample:
        lines += ["", "Sample:", *(f"  {line}" for line in status.sample.strip().splitlines())]
    return "\n".join(lines)


def _losses(report: RunReport) -> str:
    if report.final_loss is None:
        return "no step completed"
    parts = [f"{report.final_loss:.3f} nats per token"]
    if report.unigram_loss is not None:
        parts.append(f"unigram model {report.unigram_loss:.3f}")
    parts += [
        f"validation {name} {loss:.3f} (perplexity {perplexity(loss):.4g})"
        for name, loss in report.validation_loss.items()
    ]
    return ", ".join(parts)


def _metrics(report: RunReport) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in report.evaluation_metrics.items())


def _speed(report: RunReport) -> str:
    speed = "–" if report.tokens_per_second is None else f"{report.tokens_per_second:,.0f} tokens/s"
    if report.mfu is not None:
        speed += f", MFU {report.mfu:.1%}"
    return f"{speed}, {report.wall_seconds:.0f} s in total"


def _checkpoints(report: RunReport) -> str:
    saved = report.checkpoints
    if saved.latest_step is None:
        return "none"
    return f"{saved.saved} saved, the latest at step {saved.latest_step:,}"


def _rollbacks(report: RunReport) -> str:
    skipped = ", ".join(f"{gap.first:,} to {gap.last:,}" for gap in report.skipped)
    return f"{report.rollbacks}" + (f", skipped the data of steps {skipped}" if skipped else "")


def _incident(incident: Incident) -> str:
    who = "" if incident.worker is None else f" of worker {incident.worker}"
    if incident.resumed_seconds is None:
        return f"{incident.cause}{who} after step {incident.step:,}: training did not resume"
    lost = "no step" if not incident.steps_lost else f"{incident.steps_lost} step{'s' * (incident.steps_lost != 1)}"
    return (
        f"{incident.cause}{who} after step {incident.step:,}: resumed {incident.resumed_seconds:.2f} s after the "
        f"fault, {lost} lost"
    )
