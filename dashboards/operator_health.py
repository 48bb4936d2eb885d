"""Operator dashboard: leadership, reconciliation, API calls, agents and resources."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builder

from dashboards.layout import a_dashboard
from dashboards.panels import GREEN, ORANGE, RED, Query, heat, lines, number

RECONCILE = "pretrain_operator_reconcile_seconds"


def dashboard() -> builder.Dashboard:
    """Build the dashboard of the operator."""
    return a_dashboard(
        "Pre-training / Operator",
        "pretrain-operator",
        "Health of the operator: leadership, reconciliation, API calls, agents, resources.",
        (),
        (("Now", NOW), ("Reconciliation", RECONCILING), ("API server and agents", CALLS), ("Resources", RESOURCES)),
        since="now-3h",
    )


def _quantile(share: float) -> str:
    return f"histogram_quantile({share}, sum by (le) (rate({RECONCILE}_bucket[$__rate_interval])))"


NOW = (
    number(
        "Active replicas",
        "Exactly one; none only during a change of leader. Other replicas stand by.",
        Query("sum(pretrain_operator_leader)"),
        thresholds=((None, RED), (1, GREEN), (2, RED)),
        none="none",
    ),
    number(
        "Uptime",
        "Uptime of the active replica. Training does not depend on it.",
        Query(
            "max(time() - pretrain_operator_process_start_time_seconds and on (instance) pretrain_operator_leader == 1)"
        ),
        "s",
        trend=False,
    ),
    number("Jobs", "Jobs managed by the operator.", Query("count(max by (namespace, name) (pretrain_job_step))")),
    number("Agents", "Connected agents.", Query("sum(pretrain_operator_agents_connected)")),
    number(
        "Oldest queue entry",
        "Longest time that a job has waited for reconciliation.",
        Query("max(pretrain_operator_queue_oldest_seconds)"),
        "s",
        ((None, GREEN), (2, ORANGE), (10, RED)),
    ),
    number(
        "Slow reconciliations",
        "99 % of reconciliations were faster.",
        Query(_quantile(0.99)),
        "s",
        ((None, GREEN), (0.1, ORANGE), (1, RED)),
    ),
)

RECONCILING = (
    heat(
        "Duration of reconciliations",
        "A reconciliation observes a job, decides and acts.",
        Query(f"sum by (le) (increase({RECONCILE}_bucket[$__rate_interval]))", "{{le}}"),
        "s",
    ),
    lines(
        "Typical and slow reconciliations",
        "Quantiles over the interval.",
        (
            Query(_quantile(0.5), "median"),
            Query(_quantile(0.99), "99th percentile"),
        ),
        "s",
        limit=1,
    ),
    lines(
        "Reconciliations per second",
        "Over all jobs. Idle jobs are rarely reconciled.",
        (Query(f"sum(rate({RECONCILE}_count[$__rate_interval]))", "reconciliations per second"),),
        "ops",
    ),
    lines(
        "Queue",
        "Jobs waiting for reconciliation, and the longest wait.",
        (
            Query("max(pretrain_operator_queue_depth)", "jobs"),
            Query("max(pretrain_operator_queue_oldest_seconds)", "longest wait in seconds"),
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
        "Occasional 404 and 409 are normal; 403 means missing permissions, 429 and 5xx an overloaded API server.",
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
        "By reason. Expired tokens come from deleted pods; investigate other reasons.",
        (Query("sum by (reason) (rate(pretrain_operator_agents_refused_total[$__rate_interval]))", "{{reason}}"),),
        "reqps",
    ),
    lines(
        "Messages refused",
        "By reason. OutOfBounds and WrongProcesses: the worker is treated as failed. UnknownKind and Invalid come from "
        "agents of another version.",
        (Query("sum by (reason) (rate(pretrain_operator_messages_refused_total[$__rate_interval]))", "{{reason}}"),),
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
        "Includes the connections of agents. At the limit no more agents can connect.",
        (
            Query("pretrain_operator_process_open_fds", "{{instance}}"),
            Query("pretrain_operator_process_max_fds", "limit of {{instance}}"),
        ),
        span=8,
        log=True,
    ),
)
