"""Recovery dashboard: number, duration, phases and cost of faults."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builder

from dashboards.layout import a_dashboard, job_variables
from dashboards.panels import CAUSES, GREEN, ORANGE, RECOVERY, RED, SPENT, Query, columns, heat, lines, number

JOBS = 'namespace=~"$namespace",name=~"$name"'
INTERRUPTION = "pretrain_job_interruption_seconds"
SLOW = ((None, GREEN), (10.0, ORANGE), (60.0, RED))


def dashboard() -> builder.Dashboard:
    """Build the dashboard of faults and recoveries."""
    return a_dashboard(
        "Pre-training / Recovery",
        "pretrain-recovery",
        "Faults of the selected jobs and their recoveries, from the fault to the first step after it.",
        job_variables(all_of_them=True),
        (("In the time range shown", RANGE), ("Duration", DURATION), ("Cause and cost", COST)),
        since="now-24h",
    )


def _quantile(share: float, window: str) -> str:
    return f"histogram_quantile({share}, sum by (le) (increase({INTERRUPTION}_bucket{{{JOBS}}}[{window}])))"


RANGE = (
    number(
        "Faults",
        "Generations ended by a fault.",
        Query(f"sum(increase(pretrain_job_restarts_total{{{JOBS}}}[$__range]))", instant=True),
        decimals=0,
    ),
    number(
        "Recovered",
        "Incidents after which training resumed.",
        Query(f"sum(increase({INTERRUPTION}_count{{{JOBS}}}[$__range]))", instant=True),
        decimals=0,
    ),
    number(
        "Typical interruption",
        "Median time from the fault to the first step after it.",
        Query(_quantile(0.5, "$__range"), instant=True),
        "s",
        SLOW,
        decimals=2,
    ),
    number(
        "Slow interruption",
        "95 % of incidents recovered within this time.",
        Query(_quantile(0.95, "$__range"), instant=True),
        "s",
        SLOW,
        decimals=2,
    ),
    number(
        "Steps lost to faults",
        "Steps that were repeated.",
        Query(f"sum(increase(pretrain_job_lost_steps_total{{{JOBS}}}[$__range]))", instant=True),
        "short",
        decimals=0,
    ),
    number(
        "Time lost to faults",
        "Recovering, restoring and repeating lost steps, summed over the jobs.",
        Query(
            "sum(increase(pretrain_job_goodput_seconds_total"
            f'{{{JOBS},state=~"recovering|restoring|redoing"}}[$__range]))',
            instant=True,
        ),
        "s",
    ),
)

DURATION = (
    heat(
        "Interruptions",
        "Distribution of the time from the fault to the first step after it.",
        Query(f"sum by (le) (increase({INTERRUPTION}_bucket{{{JOBS}}}[$__rate_interval]))", "{{le}}"),
        "s",
    ),
    lines(
        "Typical and slow interruptions",
        "Quantiles over the last hour.",
        (
            Query(_quantile(0.5, "1h"), "median"),
            Query(_quantile(0.95, "1h"), "95th percentile"),
        ),
        "s",
    ),
    lines(
        "Phases of a recovery",
        "Mean over the last hour, stacked: detect (fault to detection), reform (to the new generation), restart (to "
        "running ranks), restore (to the restored state), first step.",
        (
            Query(
                f"sum by (phase) (increase(pretrain_job_recovery_seconds_sum{{{JOBS}}}[1h]))"
                f" / (sum by (phase) (increase(pretrain_job_recovery_seconds_count{{{JOBS}}}[1h])) > 0)",
                "{{phase}}",
            ),
        ),
        "s",
        stacked=True,
        colours=RECOVERY,
    ),
    lines(
        "Slow phases",
        "95th percentile of each phase over the last hour.",
        (
            Query(
                "histogram_quantile(0.95, sum by (le, phase) "
                f"(increase(pretrain_job_recovery_seconds_bucket{{{JOBS}}}[1h])))",
                "{{phase}}",
            ),
        ),
        "s",
        colours=RECOVERY,
    ),
)

COST = (
    lines(
        "Faults by cause",
        "WorkerLost: pod or process gone. WorkerSilent: no contact and no steps. RankFailed: the program exited. "
        "Hang: no step within the timeout.",
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
        "Time lost by state",
        "Share of the jobs' time that faults cost.",
        (
            Query(
                "sum by (state) (rate(pretrain_job_goodput_seconds_total"
                f'{{{JOBS},state=~"recovering|restoring|redoing|starting"}}[$__rate_interval])) > 0',
                "{{state}}",
            ),
        ),
        "percentunit",
        stacked=True,
        colours=SPENT,
    ),
    columns(
        "Jobs with faults",
        "Jobs with at least one fault in the time range shown.",
        Query(
            f"sum by (namespace, name) (increase(pretrain_job_restarts_total{{{JOBS}}}[$__range])) > 0", instant=True
        ),
        {"namespace": "Namespace", "name": "Job"},
        {
            "Faults": (
                Query(
                    f"sum by (namespace, name) (increase(pretrain_job_restarts_total{{{JOBS}}}[$__range]))",
                    instant=True,
                ),
                "none",
            ),
            "Mean interruption": (
                Query(
                    f"sum by (namespace, name) (increase({INTERRUPTION}_sum{{{JOBS}}}[$__range]))"
                    f" / (sum by (namespace, name) (increase({INTERRUPTION}_count{{{JOBS}}}[$__range])) > 0)",
                    instant=True,
                ),
                "s",
            ),
            "Lost steps": (
                Query(
                    f"sum by (namespace, name) (increase(pretrain_job_lost_steps_total{{{JOBS}}}[$__range]))",
                    instant=True,
                ),
                "none",
            ),
            "Since progress": (
                Query(f"max by (namespace, name) (pretrain_job_failures_since_progress{{{JOBS}}})", instant=True),
                "none",
            ),
        },
        link=("Job", "/d/pretrain-job?var-namespace=${__data.fields.Namespace}&var-name=${__data.fields.Job}"),
        height=8,
    ),
)
