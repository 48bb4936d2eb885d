"""All jobs at a glance: who trains, how fast, how well, and which one wants attention."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builder

from dashboards.frame import a_dashboard, variable
from dashboards.look import (
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
    """A gauge of every job."""
    return f"max by ({per}) ({metric}{{{JOBS}{more}}})"


def column(expr: str) -> Query:
    """A column of the table."""
    return Query(expr, instant=True)


def dashboard() -> builder.Dashboard:
    """The dashboard of all jobs."""
    namespaces = variable("namespace", "Namespace", "label_values(pretrain_job_phase, namespace)", all_of_them=True)
    return a_dashboard(
        "Pre-training / Fleet",
        "pretrain-fleet",
        "All PretrainJobs: phases, speed, goodput, restarts. A row of the table leads to the job's own dashboard.",
        (namespaces,),
        (("Now", NOW), ("Jobs", JOBS_PANELS), ("Over time", OVER_TIME)),
        since="now-6h",
    )


def _count(phases: str) -> Query:
    chosen = f',phase=~"{phases}"'
    return Query(f"count({each('pretrain_job_phase', chosen)} == 1) or vector(0)")


TRAINING = each("pretrain_job_workers", ',state="Training"')


NOW = (
    number("Jobs that train", "Steps are being done.", _count("Training"), thresholds=((None, GREEN),), span=3),
    number(
        "Jobs on the way",
        "Pending, starting, or holding between two generations.",
        _count("Pending|Starting|Holding"),
        span=3,
    ),
    number(
        "Jobs that recover",
        "A fault is being overcome.",
        _count("Recovering"),
        thresholds=((None, GREEN), (1, ORANGE)),
        span=3,
    ),
    number(
        "Jobs that failed",
        "Until they are deleted.",
        _count("Failed"),
        thresholds=((None, GREEN), (1, RED)),
        span=3,
    ),
    number(
        "Workers that train, all jobs",
        "Members of generations.",
        Query(f"sum({TRAINING})"),
        span=3,
    ),
    number(
        "Tokens per second, all jobs",
        "Of the jobs that train now.",
        Query(f"sum({each('pretrain_job_tokens_per_second')})"),
        "short",
        span=3,
    ),
    number(
        "Goodput of the last hour",
        "Share of training in the time of all jobs, without queueing and suspension.",
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
        "Restarts of the last hour",
        "Generations that a fault ended, over all jobs.",
        Query(f"sum(increase(pretrain_job_restarts_total{{{JOBS}}}[1h]))"),
        span=3,
        decimals=0,
    ),
)

JOBS_PANELS = (
    columns(
        "All jobs",
        "One row for each job. Its name leads to its dashboard.",
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
            "Checkpoint's age": (column(f"time() - {each('pretrain_job_last_checkpoint_timestamp_seconds')}"), "s"),
        },
        link=("Job", JOB_LINK),
    ),
)

OVER_TIME = (
    lines(
        "Tokens per second by job",
        "Stacked: the top is the fleet's speed.",
        (Query(each("pretrain_job_tokens_per_second"), "{{namespace}}/{{name}}"),),
        "short",
        stacked=True,
    ),
    lines(
        "Where the fleet's time goes",
        "Seconds of all jobs by what they were spent on; green is progress.",
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
        "All jobs that there are.",
        (Query(f"count by (phase) (max by ({KEYS}, phase) (pretrain_job_phase{{{JOBS}}}) == 1)", "{{phase}}"),),
        stacked=True,
        colours=PHASES,
    ),
    lines(
        "Workers by state, all jobs",
        "Lost or starting ones that stay point to nodes or quota.",
        (Query(f"sum by (state) (max by ({KEYS}, state) (pretrain_job_workers{{{JOBS}}})) > 0", "{{state}}"),),
        stacked=True,
        colours=WORKERS,
    ),
    lines(
        "Restarts by cause, all jobs",
        "Many at once on several jobs: look at nodes and network first.",
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
