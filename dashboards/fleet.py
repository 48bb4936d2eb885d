"""Fleet dashboard: phases, speed and goodput of all jobs."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builder

from dashboards.layout import a_dashboard, variable
from dashboards.panels import (
    CAUSES,
    GREEN,
    ORANGE,
    PHASES,
    RED,
    SPENT,
    WORKERS,
    Query,
    columns,
    lines,
    number,
)

JOBS = 'namespace=~"$namespace"'
KEYS = "namespace, name"
JOB_LINK = "/d/pretrain-job?var-namespace=${__data.fields.Namespace}&var-name=${__data.fields.Job}"


def each(metric: str, more: str = "", per: str = KEYS) -> str:
    """Query a gauge of every job."""
    return f"max by ({per}) ({metric}{{{JOBS}{more}}})"


def column(expr: str) -> Query:
    """Query a column of the table."""
    return Query(expr, instant=True)


def dashboard() -> builder.Dashboard:
    """Build the dashboard of all jobs."""
    namespaces = variable("namespace", "Namespace", "label_values(pretrain_job_phase, namespace)", all_of_them=True)
    return a_dashboard(
        "Pre-training / Fleet",
        "pretrain-fleet",
        "All PretrainJobs: phases, speed, goodput, restarts. Rows of the table link to the jobs' dashboards.",
        (namespaces,),
        (("Now", NOW), ("Jobs", JOBS_PANELS), ("Over time", OVER_TIME)),
        since="now-6h",
    )


def _count(phases: str) -> Query:
    chosen = f',phase=~"{phases}"'
    return Query(f"count({each('pretrain_job_phase', chosen)} == 1) or vector(0)")


TRAINING = each("pretrain_job_workers", ',state="Training"')


NOW = (
    number("Training jobs", "Jobs in phase Training.", _count("Training"), thresholds=((None, GREEN),), span=3),
    number(
        "Starting and waiting jobs",
        "Jobs in phase Pending, Starting or Holding.",
        _count("Pending|Starting|Holding"),
        span=3,
    ),
    number(
        "Recovering jobs",
        "Jobs in phase Recovering.",
        _count("Recovering"),
        thresholds=((None, GREEN), (1, ORANGE)),
        span=3,
    ),
    number(
        "Failed jobs",
        "Jobs in phase Failed, until they are deleted.",
        _count("Failed"),
        thresholds=((None, GREEN), (1, RED)),
        span=3,
    ),
    number(
        "Training workers, all jobs",
        "Workers that are members of a generation.",
        Query(f"sum({TRAINING})"),
        span=3,
    ),
    number(
        "Tokens per second, all jobs",
        "Sum over the jobs that train now.",
        Query(f"sum({each('pretrain_job_tokens_per_second')})"),
        "short",
        span=3,
    ),
    number(
        "Goodput, last hour",
        "Share of training in all jobs' time, without queueing and suspension.",
        Query(
            f'sum(rate(pretrain_job_goodput_seconds_total{{{JOBS},state="training"}}[1h]))'
            f' / (sum(rate(pretrain_job_goodput_seconds_total{{{JOBS},state!~"queued|suspended"}}[1h])) > 0)'
        ),
        "percentunit",
        ((None, RED), (0.7, ORANGE), (0.9, GREEN)),
        span=3,
        decimals=1,
    ),
    number(
        "Restarts, last hour",
        "Generations ended by a fault, over all jobs.",
        Query(f"sum(increase(pretrain_job_restarts_total{{{JOBS}}}[1h]))"),
        span=3,
        decimals=0,
    ),
)

JOBS_PANELS = (
    columns(
        "All jobs",
        "One row per job. The name links to its dashboard.",
        column(f"max by ({KEYS}, phase) (pretrain_job_phase{{{JOBS}}}) == 1"),
        {"namespace": "Namespace", "name": "Job", "phase": "Phase"},
        {
            "Progress": (column(f"{each('pretrain_job_step')} / {each('pretrain_job_target_step')}"), "percentunit"),
            "Step": (column(each("pretrain_job_step")), ""),
            "Loss": (column(each("pretrain_job_loss")), ""),
            "Tokens/s": (column(each("pretrain_job_tokens_per_second")), "short"),
            "MFU": (column(each("pretrain_job_mfu_ratio")), "percentunit"),
            "Parameters": (column(each("pretrain_job_parameters")), "short"),
            "Workers": (column(TRAINING), ""),
            "Generation": (column(each("pretrain_job_generation")), ""),
            "Goodput": (column(each("pretrain_job_goodput_ratio")), "percentunit"),
            "Restarts, 1 h": (column(f"sum by ({KEYS}) (increase(pretrain_job_restarts_total{{{JOBS}}}[1h]))"), "none"),
            "Checkpoint age": (column(f"time() - {each('pretrain_job_last_checkpoint_timestamp_seconds')}"), "s"),
        },
        link=("Job", JOB_LINK),
    ),
)

OVER_TIME = (
    lines(
        "Tokens per second by job",
        "Stacked: the top is the speed of the fleet.",
        (Query(each("pretrain_job_tokens_per_second"), "{{namespace}}/{{name}}"),),
        "short",
        stacked=True,
    ),
    lines(
        "Fleet time by state",
        "Time of all jobs by goodput state; green is training.",
        (
            Query(
                f"sum by (state) (rate(pretrain_job_goodput_seconds_total{{{JOBS}}}[$__rate_interval])) > 0",
                "{{state}}",
            ),
        ),
        "percentunit",
        shares=True,
        colours=SPENT,
    ),
    lines(
        "Jobs by phase",
        "All existing jobs.",
        (Query(f"count by (phase) (max by ({KEYS}, phase) (pretrain_job_phase{{{JOBS}}}) == 1)", "{{phase}}"),),
        stacked=True,
        colours=PHASES,
    ),
    lines(
        "Workers by state, all jobs",
        "Workers that stay Lost or Starting indicate node or quota problems.",
        (Query(f"sum by (state) (max by ({KEYS}, state) (pretrain_job_workers{{{JOBS}}})) > 0", "{{state}}"),),
        stacked=True,
        colours=WORKERS,
    ),
    lines(
        "Restarts by cause, all jobs",
        "If several jobs restart at once, check nodes and network first.",
        (
            Query(
                f"sum by (cause) (increase(pretrain_job_restarts_total{{{JOBS}}}[$__rate_interval])) > 0", "{{cause}}"
            ),
        ),
        bars=True,
        stacked=True,
        colours=CAUSES,
    ),
    lines(
        "Loss by job",
        "Training loss of the last step.",
        (Query(each("pretrain_job_loss"), "{{namespace}}/{{name}}"),),
        from_zero=False,
    ),
)
