"""A real Prometheus scrapes a run: every panel of every dashboard has data, every rule works."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.operator.metrics import ScrapedRun, a_scraped_run
from support.prometheus import Prometheus, prometheus
from support.tools import Programs

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/pretrain-operator"
BOARDS = {file.stem: json.loads(file.read_text()) for file in sorted((CHART / "dashboards").glob("*.json"))}
VARIABLES = {"namespace": "ml", "name": "gpt2", "__rate_interval": "5s", "__range": "1m"}
TARGETS = [
    (board, panel["title"], target)
    for board, made in BOARDS.items()
    for panel in made["panels"]
    for target in panel.get("targets", ())
]


@pytest.fixture(scope="module")
def server(prometheus_programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has seen some seconds of a run, with faults in it."""
    with a_scraped_run() as run, prometheus(tmp_path_factory.mktemp("prometheus"), _configuration(run)) as server:
        # Counters must have been seen at their beginning: what comes before does not grow.
        until(
            lambda: server.query("pretrain_job_interruption_seconds_count") and server.query("pretrain_worker_step > 0")
        )
        run.go.set()
        until(lambda: server.query("pretrain_job_interruption_seconds_count > 2"))
        for counter in ("nonfinite_losses", "loss_spikes", "rollbacks"):
            until(lambda counter=counter: server.query(f"increase(pretrain_job_{counter}_total[5s]) > 0"))
        until(lambda: all(group["lastEvaluation"] > "0002" for group in server.rules()))
        yield server


def until(condition: Callable[[], Any]) -> Any:
    """What the condition returns, once there is something."""
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline, "Prometheus has not seen it"
        time.sleep(0.1)
    return found


def _configuration(run: ScrapedRun) -> dict[str, Any]:
    """As the chart's ServiceMonitor and PodMonitor have it scraped."""
    workers = [
        {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "ml", "name": "gpt2", "slot": str(slot)}}
        for slot, port in enumerate(run.worker_ports)
    ]
    return {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(CHART / "alerts.yaml")],
        "scrape_configs": [
            {
                "job_name": "operator",
                "honor_labels": True,
                "static_configs": [
                    {"targets": [f"127.0.0.1:{run.operator_port}"], "labels": {"namespace": "pretrain-system"}}
                ],
            },
            {"job_name": "workers", "static_configs": workers},
        ],
    }


def rendered(expr: str) -> str:
    """The expression with its variables put in, as Grafana does it."""
    return re.sub(r"\$\{?(\w+)\}?", lambda found: VARIABLES[found[1]], expr)


@pytest.mark.parametrize(
    ("board", "panel", "target"),
    TARGETS,
    ids=[f"{board}: {panel} {target['refId']}" for board, panel, target in TARGETS],
)
def test_every_query_of_every_panel_returns_data(
    server: Prometheus, board: str, panel: str, target: dict[str, Any]
) -> None:
    expr = rendered(target["expr"])

    def look() -> Any:
        now = time.time()
        return server.query(expr) if target.get("instant") else server.query_range(expr, now - 10, now, 1)

    found = until(look)  # on a busy machine a scrape may be late, and nothing is there for a moment

    values = [sample["value"][1] if "value" in sample else sample["values"][-1][1] for sample in found]
    assert any(value != "NaN" for value in values), f"{expr}: {values}"


@pytest.mark.parametrize(
    ("board", "variable"),
    [
        (board, variable)
        for board, made in BOARDS.items()
        for variable in made["templating"]["list"]
        if variable["type"] == "query"
    ],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_every_variable_offers_the_job(server: Prometheus, board: str, variable: dict[str, Any]) -> None:
    found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
    assert found is not None

    assert server.values_of(found[2], rendered(found[1])) == [VARIABLES[variable["name"]]]


def test_the_legends_name_labels_that_the_series_have(server: Prometheus) -> None:
    for board, panel, target in TARGETS:
        wanted = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
        now = time.time()
        for series in server.query_range(rendered(target["expr"]), now - 10, now, 1):
            assert wanted <= series["metric"].keys(), f"{board}: {panel}"


def test_all_rules_work(server: Prometheus) -> None:
    rules = [rule for group in server.rules() for rule in group["rules"]]

    assert len(rules) > 7
    assert [rule for rule in rules if rule["health"] != "ok"] == []
    assert server.query("pretrain:job_goodput:ratio_rate1h{namespace='ml',name='gpt2'} > 0")


def test_a_job_is_told_from_the_operators_own_namespace(server: Prometheus) -> None:
    assert server.values_of("namespace", "pretrain_job_step") == ["ml"]
    assert server.values_of("namespace", "pretrain_operator_leader") == ["pretrain-system"]
