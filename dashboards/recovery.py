"""Faults: how often, how long they interrupt training, in which phase the seconds go, and what they cost."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builder

from dashboards.frame import a_dashboard, job_variables
from dashboards.look import CAUSES, GREEN, ORANGE, RECOVERY, RED, SPENT, Query, columns, heat, lines, number

JOBS = 'namespace=~"$namespace",name=~"$name"'
INTERRUPTION = "pretrain_job_interruption_seconds"
SLOW = ((None, GREEN), (10.0, ORANGE), (60.0, RED))


def dashboard() -> builder.Dashboard:
    """The dashboard of faults and recoveries."""
    return a_dashboard(
        "Pre-training / Recovery",
        "pretrain-recovery",
        "Faults of the chosen jobs and how they were overcome: from the fault to the first step after it.",
        job_variables(all_of_them=True),
        (("In the time range shown", RANGE), ("How long", DURATION), ("Why and at what cost", COST)),
        since="now-24h",
    )


def _quantile(share: float, window: str) -> str:
    return f"histogram_quantile({share}, sum by (le) (increase({INTERRUPTION}_bucket{{{JOBS}}}[{window}])))"


RANGE = (
    number(
        "Faults",
        "Generations that a fault ended.",
        Query(f"sum(increase(pretrain_job_restarts_total{{{JOBS}}}[$__range]))", instant=True),
        decimals=0,
    ),
    number(
        "Overcome",
        "Incidents after which training went on.",
        Query(f"sum(increase({INTERRUPTION}_count{{{JOBS}}}[$__range]))", instant=True),
        decimals=0,
    ),
    number(
        "Typical interruption",
        "Half of the incidents were overcome in this time, from the fault to the first step after it.",
        Query(_quantile(0.5, "$__range"), instant=True),
        "s",
        SLOW,
        decimals=2,
    ),
    number(
        "Slow interruption",
        "95 % of the incidents were overcome in this time.",
        Query(_quantile(0.95, "$__range"), instant=True),
        "s",
        SLOW,
        decimals=2,
    ),
    number(
        "Steps lost to faults",
        "Steps that had to be done again.",
        Query(f"sum(increase(pretrain_job_lost_steps_total{{{JOBS}}}[$__range]))", instant=True),
        "short",
        decimals=0,
    ),
    number(
        "Time lost to faults",
        "Recovering, starting, restoring, and doing lost steps again, summed over the jobs.",
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
        "How many incidents took how long, from the fault to the first step after it.",
        Query(f"sum by (le) (increase({INTERRUPTION}_bucket{{{JOBS}}}[$__rate_interval]))", "{{le}}"),
        "s",
    ),
    lines(
        "Typical and slow interruptions",
        "Over the last hour at each point.",
        (
            Query(_quantile(0.5, "1h"), "half are shorter than"),
            Query(_quantile(0.95, "1h"), "95 % are shorter than"),
        ),
        "s",
    ),
    lines(
        "Phases of a recovery",
        "Mean over the last hour, stacked: detect (from the fault to its discovery), reform (a new generation), "
        "restart (all ranks run), restore (the state stands), first step.",
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
        "95 % of the recoveries of the last hour spent no more than this in each phase.",
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
        "WorkerLost: pod or process gone. WorkerSilent: no contact and no steps. RankFailed: the program ended. "
        "Hang: no step for too long.",
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
        "Time that faults cost",
        "Share of the jobs' time spent on anything but training because of faults.",
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
        "In the time range shown.",
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
