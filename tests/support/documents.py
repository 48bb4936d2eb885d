"""Markdown documents of the repository: their code blocks, commands and inline code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    {
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / ".github").rglob("*.md"),
        ROOT / "charts/pretrain-operator/README.md",
    }
)
_FENCE = re.compile(r"( *)```(\w*)\n(.*?)\n\1```", re.DOTALL)
_OPERATORS = {";", "&&", "||", "|", "&"}


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    language: str
    text: str


def name_of(document: Path) -> str:
    """Return the document's path below the root, for test ids."""
    return str(document.relative_to(ROOT))


def blocks(document: Path) -> list[Block]:
    """Return the fenced blocks, without the indentation of a list."""
    found = _FENCE.finditer(document.read_text(encoding="utf-8"))
    return [Block(it[2], re.sub(rf"^{it[1]}", "", it[3], flags=re.MULTILINE)) for it in found]


def inline_code(document: Path) -> list[str]:
    """Return the texts in backquotes outside of fenced blocks."""
    text = _FENCE.sub("", document.read_text(encoding="utf-8"))
    return [" ".join(it.split()) for it in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def commands(document: Path) -> list[list[str]]:
    """Return the commands of shell blocks, those after a prompt in transcripts, and those in inline code."""
    lines: list[str] = []
    for block in blocks(document):
        if block.language in ("sh", "bash", "shell"):
            lines += block.text.replace("\\\n", " ").splitlines()
        else:
            lines += [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]
    return [command for line in lines for command in _split(line)]


def inline_commands(document: Path) -> list[list[str]]:
    """Return inline code that begins with a program's name and has an argument."""
    programs = ("pretrain ", "kubectl ", "helm ", "make ", "pytest ", "python -m ")
    codes = [code.removeprefix(".venv/bin/") for code in inline_code(document)]
    return [shlex.split(code) for code in codes if code.startswith(programs)]


def _split(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    command: list[str] = []
    for word in lexer:
        if word in _OPERATORS:
            yield command
            command = []
        else:
            command.append(word)
    if command:
        yield command
