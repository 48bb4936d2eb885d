"""Prose of the documents: width, and the words that the project does not use."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.documents import DOCUMENTS, ROOT, blocks, name_of
from support.prose import foreign_words
from tools.docs.prose import WIDTH, long_lines, wrapped

FOR_PEOPLE = [
    ROOT / "Makefile",
    ROOT / "mkdocs.yml",
    *sorted((ROOT / "charts/pretrain-operator").glob("*.yaml")),
    ROOT / "charts/pretrain-operator/templates/NOTES.txt",
    *sorted(
        path
        for path in (ROOT / "examples").rglob("*")
        if path.is_file() and not {"data", "__pycache__"} & {*path.parts}
    ),
    *sorted((ROOT / ".github").rglob("*.y*ml")),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_lines_are_wrapped(document: Path) -> None:
    assert long_lines(document.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [*DOCUMENTS, *FOR_PEOPLE], ids=name_of)
def test_the_words_are_the_field_s(path: Path) -> None:
    assert foreign_words(" ".join(path.read_text(encoding="utf-8").split())) == {}


def test_code_and_tables_stay_whole_when_text_is_wrapped() -> None:
    row = f"| {'cell ' * 40}|"
    code = f"```sh\n{'word ' * 40}\n```"
    text = f"# {'heading ' * 20}\n\n{'word ' * 40}`{'code ' * 10}`\n\n- {'item ' * 40}\n\n{row}\n\n{code}\n"

    lines = wrapped(text).splitlines()

    assert row in lines
    assert "word " * 40 in lines
    assert all(len(line) <= WIDTH for line in lines if "heading" not in line and line != row and line != "word " * 40)
    assert wrapped(wrapped(text)) == wrapped(text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_a_block_of_code_names_its_language(document: Path) -> None:
    assert [block.text for block in blocks(document) if not block.language] == []
