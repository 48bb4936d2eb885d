"""The dashboards: what is committed is what the code makes, and it speaks of nothing that the code does not show."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dashboards import panels as panel_kinds
from dashboards.__main__ import FOLDER, ROOT, drift, rendered
from pretrain_agent.network import metrics_server as exposition
from pretrain_api.status.records import STEP_PARTS
from pretrain_operator.metrics import families as metrics_families

FILES = sorted((ROOT / FOLDER).glob("*.json"))
FAMILIES = (*metrics_families.JOB_FAMILIES, *metrics_families.OPERATOR_FAMILIES, *exposition.FAMILIES)
SHOWN = {name for family in FAMILIES for name in family.series}
ELSEWHERE = {
    "pretrain_operator_process_virtual_memory_bytes",
    "pretrain_worker_generation",
}
"""Shown for queries by hand."""

boards = pytest.mark.parametrize("board", [json.loads(file.read_text()) for file in FILES], ids=[f.stem for f in FILES])


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions(board: dict[str, Any]) -> Iterator[str]:
    for panel in panels(board):
        for target in panel["targets"]:
            yield target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]


def metrics_in(text: str) -> set[str]:
    return set(re.findall(r"\bpretrain_(?:job|operator|worker)_\w+", text))


def test_there_are_four_dashboards_that_know_each_other_by_a_tag() -> None:
    made = [json.loads(file.read_text()) for file in FILES]

    assert {board["uid"] for board in made} == {
        "pretrain-fleet",
        "pretrain-job",
        "pretrain-recovery",
        "pretrain-operator",
    }
    assert all(board["tags"] == ["pretrain"] and board["links"][0]["tags"] == ["pretrain"] for board in made)


def test_the_committed_files_are_what_the_code_makes() -> None:
    assert drift(ROOT) == "", "run `.venv/bin/python -m dashboards`"


def test_the_check_fails_when_a_file_has_drifted(tmp_path: Path) -> None:
    for path, text in rendered().items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert drift(tmp_path) == ""

    (tmp_path / FOLDER / "stray.json").write_text("{}\n")
    (tmp_path / FOLDER / "pretrain-job.json").write_text("{}\n")

    assert {"stray.json", "pretrain-job.json"} <= set(re.findall(r"--- \S+/(\S+)", drift(tmp_path)))


def test_the_check_is_a_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "dashboards", "--check"], cwd=ROOT, capture_output=True, timeout=120)

    assert ran.returncode == 0


@boards
def test_every_metric_of_a_dashboard_is_one_that_the_code_shows(board: dict[str, Any]) -> None:
    used = set().union(*map(metrics_in, expressions(board)))

    assert used
    assert used <= SHOWN


def test_every_metric_that_the_code_shows_is_on_a_dashboard_or_meant_for_elsewhere() -> None:
    used = set().union(*(metrics_in(text) for file in FILES for text in expressions(json.loads(file.read_text()))))

    unused = {family.name for family in FAMILIES if used.isdisjoint(family.series)}
    assert unused <= ELSEWHERE


@boards
def test_panels_have_ids_and_titles_of_their_own(board: dict[str, Any]) -> None:
    everything = board["panels"]

    assert len({panel["id"] for panel in everything}) == len(everything)
    assert len({panel["title"] for panel in everything}) == len(everything)


@boards
def test_panels_say_what_they_show_and_in_which_unit(board: dict[str, Any]) -> None:
    for panel in panels(board):
        assert panel["description"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["expr"].count("(") == target["expr"].count(")") for target in panel["targets"])
        if panel["type"] == "timeseries":
            assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]


@boards
def test_panels_lie_beside_each_other_not_on_top(board: dict[str, Any]) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        left, top = place.get("x", 0), place.get("y", 0)
        assert left + place["w"] <= 24, panel["title"]
        for cell in ((x, y) for x in range(left, left + place["w"]) for y in range(top, top + place["h"])):
            assert cell not in taken, f"{panel['title']} on {taken[cell]}"
            taken[cell] = panel["title"]


def test_a_state_has_the_same_colour_wherever_it_appears() -> None:
    colours: dict[str, set[str]] = {}
    for panel in (panel for file in FILES for panel in panels(json.loads(file.read_text()))):
        for override in panel.get("fieldConfig", {}).get("overrides", []):
            for change in override["properties"]:
                if change["id"] == "color":
                    colours.setdefault(override["matcher"]["options"], set()).add(change["value"]["fixedColor"])

    assert colours
    assert all(len(found) == 1 for found in colours.values()), colours


def test_every_state_has_a_colour() -> None:
    assert set(panel_kinds.PHASES) == set(metrics_families.PHASES)
    assert set(panel_kinds.SPENT) == set(metrics_families.GOODPUT_STATES)
    assert set(panel_kinds.WORKERS) == set(metrics_families.WORKER_STATES)
    assert set(panel_kinds.RECOVERY) == set(metrics_families.RECOVERY_PHASES)
    assert set(panel_kinds.STEP) == set(STEP_PARTS)
    assert set(panel_kinds.CAUSES) == set(metrics_families.RESTART_CAUSES)


@boards
def test_only_variables_that_exist_are_used(board: dict[str, Any]) -> None:
    known = {variable["name"] for variable in board["templating"]["list"]} | {"__rate_interval", "__range"}

    used = {name for text in expressions(board) for name in re.findall(r"\$\{?(\w+)", text)}
    assert used <= known
