"""Size and naming of the source code: short functions, short modules, small folders, one meaning per class name."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.sources import PACKAGES, ROOT, SHIPPED, modules_of, tree_of

MAX_FUNCTION_LINES = 40
MAX_MODULE_LINES = 350
MAX_FOLDER_MODULES = 14
LONGER = {"train"}
"""Functions that read top-down as one story."""


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_fit_a_screen(package: str) -> None:
    assert list(_long_functions(package)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_have_one_reason_to_change(package: str) -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules_of(package)}

    assert {_name(path): count for path, count in lines.items() if count > MAX_MODULE_LINES} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_fit_a_sheet(package: str) -> None:
    folders: dict[Path, int] = defaultdict(int)
    for path in modules_of(package):
        folders[path.parent] += path.name != "__init__.py"

    assert {_name(folder): count for folder, count in folders.items() if count > MAX_FOLDER_MODULES} == {}


def test_a_class_name_has_one_meaning() -> None:
    places: dict[str, set[str]] = defaultdict(set)
    for package in SHIPPED:
        for path in modules_of(package):
            for node in ast.walk(tree_of(path)):
                if isinstance(node, ast.ClassDef):
                    places[node.name.lstrip("_")].add(_name(path))

    assert {name: sorted(found) for name, found in places.items() if len(found) > 1} == {}


def _long_functions(package: str) -> Iterator[str]:
    for path in modules_of(package):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in LONGER:
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    yield f"{_name(path)}:{node.lineno} {node.name}: {lines} lines"


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))
