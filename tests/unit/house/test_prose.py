"""Prose of the source code: docstrings, comments and every text that a user can see."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.prose import foreign_words
from support.sources import PACKAGES, ROOT, modules_of, tree_of

QUESTION = re.compile(r"(What|Who|Whom|Whose|Whether|How|Of which|By which|In which|At which|To which|Where)\b")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_words_are_the_fields(package: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {word!r}: write {instead!r}"
        for path in modules_of(package)
        for line, text in _texts(path)
        for word, instead in foreign_words(" ".join(text.split())).items()
    ]

    assert found == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_docstring_begins_with_a_verb_or_a_noun(package: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in modules_of(package)
        for line, text in _docstrings(tree_of(path))
        if QUESTION.match(text)
    ]

    assert found == []


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of all string constants, f-strings whole, and of all comments."""
    tree = tree_of(path)
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            yield node.lineno, "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value
    with path.open("rb") as file:
        for token in tokenize.tokenize(io.BytesIO(file.read()).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of docstrings, those of attributes included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()
