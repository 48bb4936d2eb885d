"""Source files of the project, for tests of its structure and prose."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHIPPED = (
    "api/src", "store/src", "sdk/src", "data/src", "agent/src", "trainer/src", "operator/src", "cli/src",
)  # fmt: skip
PACKAGES = (*SHIPPED, "tools", "dashboards", "benchmarks")


def modules_of(package: str) -> tuple[Path, ...]:
    """Return all modules below the folder of a package."""
    return tuple(sorted(path for path in (ROOT / package).rglob("*.py") if "__pycache__" not in path.parts))


@cache
def tree_of(path: Path) -> ast.Module:
    """Return the syntax tree of a module."""
    return ast.parse(path.read_text(encoding="utf-8"))
