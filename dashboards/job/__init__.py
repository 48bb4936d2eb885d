"""Job dashboard: progress, speed, goodput, workers, faults and checkpoints of one job."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builder

from dashboards.job.faults import CHECKPOINTS, FAULTS
from dashboards.job.progress import LEARNING, NOW
from dashboards.job.time import TIME
from dashboards.job.workers import WORKER
from dashboards.layout import a_dashboard, job_variables


def dashboard() -> builder.Dashboard:
    """Build the dashboard of a job."""
    return a_dashboard(
        "Pre-training / Job",
        "pretrain-job",
        "One PretrainJob: progress, losses, time by state, workers, faults and checkpoints.",
        job_variables(all_of_them=False),
        (
            ("Now", NOW),
            ("Learning", LEARNING),
            ("Time", TIME),
            ("Workers", WORKER),
            ("Faults", FAULTS),
            ("Checkpoints", CHECKPOINTS),
        ),
        since="now-6h",
    )
