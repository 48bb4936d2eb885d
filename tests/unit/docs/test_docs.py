"""What the documents say is there, is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from pretrain_operator.decide.obstacles import REMEDIES
from pretrain_operator.kubernetes.adapter.status_notices import KINDS
from support.documents import DOCUMENTS, ROOT, name_of

KUBERNETES = ROOT / "docs" / "kubernetes.md"
ERRORS = ROOT / "trainer" / "src" / "pretrain_trainer" / "core" / "errors.py"
REFUSALS = ROOT / "operator" / "src" / "pretrain_operator" / "kubernetes" / "client" / "refusals.py"
LINK = re.compile(r"\]\((?!https?://)([^)#]+)(#[^)]*)?\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    targets = [document.parent / found[1] for found in LINK.finditer(document.read_text())]

    assert [target for target in targets if not target.exists()] == []


def named(heading: str, before: str) -> set[str]:
    """What stands in backquotes in the first cells of the table of this section."""
    section = KUBERNETES.read_text().partition(heading)[2].partition(before)[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_every_reason_for_waiting_is_documented_and_no_other() -> None:
    refused = set(re.findall(r'Refused\(\s*"(\w+)"', REFUSALS.read_text()))
    reasons = {*REMEDIES, *refused, *obstacles(), "InvalidSpec"}

    assert len(refused) == 3
    assert named("### Reasons of `Blocked`", "Any other reason") == reasons


def obstacles() -> set[str]:
    """The classes of what the training program waits for: read, since importing it takes torch."""
    classes = [node for node in ast.parse(ERRORS.read_text()).body if isinstance(node, ast.ClassDef)]
    return {
        it.name.removesuffix("Error")
        for it in classes
        if any(isinstance(b, ast.Name) and b.id == "ObstacleError" for b in it.bases)
    }


def test_every_condition_is_documented_and_no_other() -> None:
    types = {"Training", "Degraded", "Blocked", "Suspended", "Complete", "Failed", *KINDS}

    assert named("## Conditions and their remedies", "### Reasons of `Blocked`") == types
