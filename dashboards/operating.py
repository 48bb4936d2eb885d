"""The operator itself: does it act, does it keep up, what does it ask of the API server."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builder

from dashboards.frame import a_dashboard
from dashboards.look import GREEN, ORANGE, RED, Query, heat, lines, number

RECONCILE = "pretrain_operator_reconcile_seconds"


def dashboard() -> builder.Dashboard:
    """The dashboard of the operator."""
    return a_dashboard(
        "Pre-training / Operator",
        "pretrain-operator",
        "The operator's own health: leadership, reconciling, API calls, agents, resources.",
        (),
        (("Now", NOW), ("Reconciling", RECONCILING), ("API server and agents", CALLS), ("Resources", RESOURCES)),
        since="now-3h",
    )


def _quantile(share: float) -> str:
    return f"histogram_quantile({share}, sum by (le) (rate({RECONCILE}_bucket[$__rate_interval])))"


NOW = (
    number(
        "Acting replicas",
        "One, and only for the moment of a change none. The others stand by.",
        Query("sum(pretrain_operator_leader)"),
        thresholds=((None, RED), (1, GREEN), (2, RED)),
        none="none",
    ),
    number(
        "Running since",
        "The acting replica's process. Training does not depend on it.",
        Query(
            "max(time() - pretrain_operator_process_start_time_seconds and on (instance) pretrain_operator_leader == 1)"
        ),
        "s",
        trend=False,
    ),
    number(
        "Jobs served", "Jobs that the operator knows.", Query("count(max by (namespace, name) (pretrain_job_step))")
    ),
    number("Agents", "Workers whose agents are connected.", Query("sum(pretrain_operator_agents_connected)")),
    number(
        "Oldest in the queue",
        "How long the job that waits longest has waited to be looked at.",
        Query("max(pretrain_operator_queue_oldest_seconds)"),
        "s",
        ((None, GREEN), (2, ORANGE), (10, RED)),
    ),
    number(
        "Slow looks",
        "99 % of the looks at a job took less.",
        Query(_quantile(0.99)),
        "s",
        ((None, GREEN), (0.1, ORANGE), (1, RED)),
    ),
)

RECONCILING = (
    heat(
        "Duration of looks",
        "To look at a job is to observe it, decide, and tell its coordinator.",
        Query(f"sum by (le) (increase({RECONCILE}_bucket[$__rate_interval]))", "{{le}}"),
        "s",
    ),
    lines(
        "Typical and slow looks",
        "Over the interval.",
        (
            Query(_quantile(0.5), "half are shorter than"),
            Query(_quantile(0.99), "99 % are shorter than"),
        ),
        "s",
        limit=1,
    ),
    lines(
        "Looks per second",
        "Over all jobs. Idle jobs are not looked at but seldom.",
        (Query(f"sum(rate({RECONCILE}_count[$__rate_interval]))", "looks per second"),),
        "ops",
    ),
    lines(
        "Queue",
        "Jobs that wait to be looked at, and how long the first of them has.",
        (
            Query("max(pretrain_operator_queue_depth)", "jobs"),
            Query("max(pretrain_operator_queue_oldest_seconds)", "seconds that the first has waited"),
        ),
        limit=10,
    ),
)

CALLS = (
    lines(
        "API calls by verb",
        "Calls per second.",
        (Query("sum by (verb) (rate(pretrain_operator_api_calls_total[$__rate_interval]))", "{{verb}}"),),
        "reqps",
        stacked=True,
    ),
    lines(
        "API calls by answer",
        "404 and 409 are ordinary now and then; 403 means rights that are missing, 429 and 5xx a server in need.",
        (Query("sum by (code) (rate(pretrain_operator_api_calls_total[$__rate_interval]))", "{{code}}"),),
        "reqps",
    ),
    lines(
        "Agents connected",
        "Over all jobs.",
        (Query("sum(pretrain_operator_agents_connected)", "agents"),),
    ),
    lines(
        "Agents refused",
        "By reason. Expired tokens come from pods that are gone; others deserve a look.",
        (Query("sum by (reason) (rate(pretrain_operator_agents_refused_total[$__rate_interval]))", "{{reason}}"),),
        "reqps",
    ),
)

RESOURCES = (
    lines(
        "CPU",
        "Cores in use by each replica.",
        (Query("rate(pretrain_operator_process_cpu_seconds_total[$__rate_interval])", "{{instance}}"),),
        span=8,
    ),
    lines(
        "Memory",
        "Resident memory of each replica.",
        (Query("pretrain_operator_process_resident_memory_bytes", "{{instance}}"),),
        "bytes",
        span=8,
    ),
    lines(
        "Open files",
        "Connections of agents among them. At the limit no more agents can connect.",
        (
            Query("pretrain_operator_process_open_fds", "{{instance}}"),
            Query("pretrain_operator_process_max_fds", "limit of {{instance}}"),
        ),
        span=8,
        log=True,
    ),
)
