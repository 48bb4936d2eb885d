"""The alerts: each says how bad it is and what to do, and fires when it should and not otherwise."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain_agent.network import metrics_server as exposition
from pretrain_operator.metrics import families as metrics_families
from support.tools import Programs

ROOT = Path(__file__).parents[3]
RULES = ROOT / "charts/pretrain-operator/alerts.yaml"
GROUPS = yaml.safe_load(RULES.read_text())["groups"]
ALERTS: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"] if "alert" in rule]
RECORDED = {rule["record"] for group in GROUPS for rule in group["rules"] if "record" in rule}
WANTED = {
    "PretrainJobNoProgress",
    "PretrainJobCheckpointTooOld",
    "PretrainJobLossNotFinite",
    "PretrainJobCrashLoop",
    "PretrainJobLowGoodput",
    "PretrainOperatorDown",
    "PretrainOperatorReconcileLag",
    "PretrainOperatorMessagesRefused",
}
SHOWN = {
    name
    for family in (*metrics_families.JOB_FAMILIES, *metrics_families.OPERATOR_FAMILIES, *exposition.FAMILIES)
    for name in family.series
}
JOB = 'namespace="ml",name="gpt2"'


@dataclass(frozen=True)
class Case:
    """What Prometheus sees, a sample a minute, and which alerts fire at a minute because of it."""

    name: str
    series: dict[str, str]
    minute: int
    fires: set[str] = field(default_factory=set)


HEALTHY_OPERATOR = {
    'pretrain_operator_leader{instance="a"}': "1x200",
    'pretrain_operator_leader{instance="b"}': "0x200",
    "pretrain_operator_queue_oldest_seconds": "0.1x200",
    'pretrain_operator_reconcile_seconds_bucket{le="0.01"}': "0+60x200",
    'pretrain_operator_reconcile_seconds_bucket{le="+Inf"}': "0+60x200",
}


def phase(of: str, values: str = "1x200") -> dict[str, str]:
    return job("pretrain_job_phase", values, f',phase="{of}"')


def job(metric: str, values: str, labels: str = "") -> dict[str, str]:
    return {f"{metric}{{{JOB}{labels}}}": values}


def goodput(state: str, values: str) -> dict[str, str]:
    return job("pretrain_job_goodput_seconds_total", values, f',state="{state}"')


TRAINS = {
    **phase("Training"),
    **job("pretrain_job_steps_total", "0+60x200"),
    **job("pretrain_job_nonfinite_losses_total", "0x200"),
    **job("pretrain_job_failures_since_progress", "0x200"),
    **job("pretrain_job_restarts_total", "0x200", ',cause="WorkerLost"'),
    **job("pretrain_job_last_checkpoint_timestamp_seconds", "0+60x200"),
    **goodput("training", "0+58x200"),
    **goodput("saving", "0+2x200"),
}

CASES = (
    Case("all is well", TRAINS, 120),
    Case(
        "a job that recovers for ever does no steps",
        {**phase("Recovering"), **job("pretrain_job_steps_total", "0+60x30 1800x170")},
        55,
        {"PretrainJobNoProgress"},
    ),
    Case(
        "it does not fire before the time is over",
        {**phase("Recovering"), **job("pretrain_job_steps_total", "0+60x30 1800x170")},
        45,
    ),
    Case(
        "a job that waits for nodes is no job without progress",
        {**phase("Pending"), **job("pretrain_job_steps_total", "0x200")},
        60,
    ),
    Case(
        "a job that is done does no steps and no harm",
        {**phase("Succeeded"), **job("pretrain_job_steps_total", "0+60x30 1800x170")},
        90,
    ),
    Case(
        "saves fail while the job trains",
        {**TRAINS, **job("pretrain_job_last_checkpoint_timestamp_seconds", "600x200")},
        80,
        {"PretrainJobCheckpointTooOld"},
    ),
    Case(
        "the checkpoint is not too old yet",
        {**TRAINS, **job("pretrain_job_last_checkpoint_timestamp_seconds", "1800x200")},
        80,
    ),
    Case(
        "there is no checkpoint at all",
        {series: values for series, values in TRAINS.items() if "checkpoint" not in series},
        80,
        {"PretrainJobCheckpointTooOld"},
    ),
    Case(
        "a job that was suspended for long begins with an old checkpoint",
        {
            **phase("Suspended", "1x100 0x100"),
            **phase("Training", "0x100 1x100"),
            **job("pretrain_job_steps_total", "0x100 0+60x100"),
            **job("pretrain_job_last_checkpoint_timestamp_seconds", "0x200"),
            **goodput("training", "0x100 0+60x100"),
        },
        120,
    ),
    Case(
        "a step is not finite, and the job fails of it",
        {
            **phase("Training", "1x20 0x180"),
            **phase("Failed", "0x20 1x180"),
            **job("pretrain_job_nonfinite_losses_total", "0x20 1x180"),
        },
        25,
        {"PretrainJobLossNotFinite"},
    ),
    Case(
        "that step was hours ago",
        {**TRAINS, **job("pretrain_job_nonfinite_losses_total", "0x20 1x180")},
        100,
    ),
    Case(
        "three failures without progress",
        {**TRAINS, **job("pretrain_job_failures_since_progress", "0x20 3x180")},
        25,
        {"PretrainJobCrashLoop"},
    ),
    Case("two may happen", {**TRAINS, **job("pretrain_job_failures_since_progress", "0x20 2x180")}, 25),
    Case(
        "many restarts, with progress in between",
        {**TRAINS, **job("pretrain_job_restarts_total", "0x20 0+1x180", ',cause="WorkerLost"')},
        40,
        {"PretrainJobCrashLoop"},
    ),
    Case(
        "a restart now and then",
        {**TRAINS, **job("pretrain_job_restarts_total", "0x20 1x20 2x20 3x140", ',cause="WorkerLost"')},
        70,
    ),
    Case(
        "half of the time is spent on recovering",
        {**TRAINS, **goodput("training", "0+30x200"), **goodput("recovering", "0+28x200")},
        100,
        {"PretrainJobLowGoodput"},
    ),
    Case(
        "a job that was suspended most of the time is none with low goodput",
        {**TRAINS, **goodput("training", "0+1x200"), **goodput("suspended", "0+57x200")},
        100,
    ),
    Case(
        "a short job's start is none either",
        {**TRAINS, **goodput("training", "0+1x200"), **goodput("saving", "0x200"), **goodput("starting", "0+58x20")},
        40,
    ),
    Case(
        "no replica acts",
        {**TRAINS, 'pretrain_operator_leader{instance="a"}': "1x20 0x180"},
        25,
        {"PretrainOperatorDown"},
    ),
    Case(
        "no replica can be scraped",
        {**TRAINS, 'pretrain_operator_leader{instance="a"}': "1x20", 'pretrain_operator_leader{instance="b"}': "0x20"},
        30,
        {"PretrainOperatorDown"},
    ),
    Case(
        "the other replica takes over",
        {
            **TRAINS,
            'pretrain_operator_leader{instance="a"}': "1x20 0x180",
            'pretrain_operator_leader{instance="b"}': "0x21 1x180",
        },
        25,
    ),
    Case(
        "jobs wait in the queue",
        {**TRAINS, "pretrain_operator_queue_oldest_seconds": "0x20 30x180"},
        30,
        {"PretrainOperatorReconcileLag"},
    ),
    Case(
        "a worker sends a number out of bounds",
        {**TRAINS, 'pretrain_operator_messages_refused_total{reason="OutOfBounds"}': "0x20 1x180"},
        25,
        {"PretrainOperatorMessagesRefused"},
    ),
    Case(
        "a newer worker sends a kind of message that the operator does not know",
        {**TRAINS, 'pretrain_operator_messages_refused_total{reason="UnknownKind"}': "0+10x200"},
        25,
    ),
    Case(
        "looks take seconds",
        {
            **TRAINS,
            'pretrain_operator_reconcile_seconds_bucket{le="1.0"}': "0+10x200",
            'pretrain_operator_reconcile_seconds_bucket{le="2.5"}': "0+60x200",
            'pretrain_operator_reconcile_seconds_bucket{le="0.01"}': "0x200",
        },
        30,
        {"PretrainOperatorReconcileLag"},
    ),
)  # fmt: skip


def test_the_alerts_are_those_that_are_wanted() -> None:
    assert {alert["alert"] for alert in ALERTS} == WANTED


def test_each_alert_has_a_case_in_which_it_fires() -> None:
    assert set().union(*(case.fires for case in CASES)) == WANTED


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_how_bad_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["description"]

    page = ROOT / "docs/runbooks" / alert["annotations"]["runbook_url"].rpartition("/docs/runbooks/")[2]
    text = page.read_text()

    assert text.startswith(f"# {alert['alert']}\n")
    assert all(f"**{part}" in text for part in ("Meaning", "First look", "Remedy"))


@pytest.mark.parametrize("rule", [rule for group in GROUPS for rule in group["rules"]], ids=lambda rule: str(rule)[:50])
def test_every_metric_of_a_rule_is_one_that_the_code_shows(rule: dict[str, Any]) -> None:
    assert set(re.findall(r"\bpretrain_\w+", rule["expr"])) <= SHOWN
    assert set(re.findall(r"\bpretrain:[\w:]+", rule["expr"])) <= RECORDED


@pytest.mark.bare
def test_alerts_fire_when_they_should_and_not_otherwise(prometheus_programs: Programs, tmp_path: Path) -> None:
    cases = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [_promtool_test(case) for case in CASES]}
    (tmp_path / "test.yaml").write_text(json.dumps(cases))

    ran = subprocess.run(
        [prometheus_programs["promtool"], "test", "rules", tmp_path / "test.yaml"],
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr


def _promtool_test(case: Case) -> dict[str, Any]:
    """The case as promtool has it. Its name is in the expression, which is what promtool prints."""
    series = {**HEALTHY_OPERATOR, **case.series}
    firing = 'count by (alertname) (ALERTS{alertstate="firing"})'
    wanted = [{"labels": f'{{alertname="{alert}", case="{case.name}"}}', "value": 1} for alert in sorted(case.fires)]
    test = {
        "expr": f'label_replace({firing}, "case", "{case.name}", "", "")',
        "eval_time": f"{case.minute}m",
        "exp_samples": wanted,
    }
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [test],
    }
