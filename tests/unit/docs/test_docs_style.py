"""Prose of the documents: width, and the words that the project does not use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.documents import DOCUMENTS, GENERATED, ROOT, blocks, name_of
from tools.docs.prose import WIDTH, long_lines, wrapped

FOR_PEOPLE = [
    ROOT / "Makefile",
    ROOT / "mkdocs.yml",
    *sorted((ROOT / "charts/pretrain-operator").glob("*.yaml")),
    ROOT / "charts/pretrain-operator/templates/NOTES.txt",
    *sorted(path for path in (ROOT / "examples").rglob("*") if path.is_file() and "data" not in path.parts),
    *sorted((ROOT / ".github").rglob("*.y*ml")),
]
WORDS = {
    r"go(es)? on|going on|went on|gone on": "resume, continue",
    r"mend(s|ed|ing)?": "fix",
    r"anew|once more": "again",
    r"(in|into) force": "committed, current",
    r"c[ao]mes? to nothing": "fails",
    r"(is|are|was) told|tells? of|says? nothing": "is notified, reports, is silent",
    r"pass(es|ed|ing)? over": "skip",
    r"let(s|ting)? (all \w+ )?go|let(s|ting)? in": "release, admit",
    r"on nobody's line|(on|off) the line|(?<!last )(?<!command )the line": "not in the checkpoint lineage, lineage",
    r"held up by": "stall",
    r"sums of all ranks": "all-reduce",
    r"so (many|much|long) (as|bytes|steps|after)|for so long": "the number or the parameter's name",
}
"""Patterns that must not occur, with what to write instead."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_lines_are_wrapped(document: Path) -> None:
    assert long_lines(document.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [it for it in DOCUMENTS if it not in GENERATED] + FOR_PEOPLE, ids=name_of)
def test_the_words_are_the_field_s(path: Path) -> None:
    text = " ".join(path.read_text(encoding="utf-8").split())

    found = {word[0]: instead for words, instead in WORDS.items() for word in re.finditer(rf"(?i)\b({words})\b", text)}

    assert found == {}


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
