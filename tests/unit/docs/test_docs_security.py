"""The threat model: every defence names tests that exist, and every known limit says what reduces it."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache

import pytest

from support.documents import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
RIGHTS = (ROOT / "charts/pretrain-operator/README.md").read_text(encoding="utf-8")
ATTACKERS = (
    "An attacker with the bucket", "An attacker in one worker pod", "An attacker with one namespace",
    "An attacker with the operator", "An attacker on the network", "An attacker in the supply chain",
)  # fmt: skip
KNOWN_LIMIT = "none: known limit"


@dataclass(frozen=True)
class ThreatRow:
    """A row of a table, by its columns' names."""

    attacker: str
    cells: dict[str, str]

    @property
    def tests(self) -> tuple[str, ...]:
        return tuple(re.findall(r"`(test_\w+)`", self.cells.get("test", "")))


def rows() -> list[ThreatRow]:
    """Return the rows of the tables about attackers."""
    found: list[ThreatRow] = []
    for section in PAGE.split("\n## ")[1:]:
        attacker, _, text = section.partition("\n")
        header: list[str] = []
        for line in text.splitlines():
            if not line.startswith("|"):
                header = []
            elif not header:
                header = cells(line)
            elif "---" not in line and header[0] in {"cannot", "can"}:
                found.append(ThreatRow(attacker, dict(zip(header, cells(line), strict=True))))
    return found


def cells(line: str) -> list[str]:
    return [it.strip() for it in line.strip().strip("|").split("|")]


@cache
def existing() -> dict[str, list[str]]:
    """Return the tests of the repository with the files that define them."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                found.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    return found


DEFENCES = [it for it in rows() if "cannot" in it.cells]


@pytest.mark.parametrize("row", DEFENCES, ids=lambda it: f"{it.attacker}: {it.cells['cannot'][:50]}")
def test_a_defence_names_tests_that_exist(row: ThreatRow) -> None:
    assert row.tests, "name the test that shows it, or move the row to the known limits"
    assert {name: existing().get(name, []) for name in row.tests if len(existing().get(name, [])) != 1} == {}


def test_what_an_attacker_can_do_has_a_test_or_is_a_known_limit() -> None:
    limits = [it for it in rows() if "can" in it.cells]

    assert [it for it in limits if not all(it.cells.values())] == []
    for row in (it for it in limits if "test" in it.cells):
        assert row.tests or row.cells["test"] == KNOWN_LIMIT
        assert all(name in existing() for name in row.tests)


@pytest.mark.parametrize("attacker", ATTACKERS)
def test_each_attacker_has_defences_and_known_limits(attacker: str) -> None:
    columns = {next(iter(it.cells)) for it in rows() if it.attacker == attacker}

    assert columns == {"cannot", "can"}


def test_the_limits_of_a_cluster_wide_installation_are_said_where_it_is_installed() -> None:
    for text in (PAGE, RIGHTS, (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")):
        plain = " ".join(text.replace("**", "").split())
        assert "cluster-admin in effect" in plain
        assert "any service account" in plain
        assert "`watchNamespace`" in plain
