"""`python -m tools.docs.prose FILE...`: wrap Markdown at 100 columns; code, tables, headings and links stay whole."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

WIDTH = 100
_TOKEN = re.compile(r"(?:`[^`]*`|!?\[[^\]]*\]\([^)]*\)|\S)+")
_FENCE = re.compile(r"\s*(```|~~~)")
_WHOLE = re.compile(r"\s*(\||#|<|!!!|\?\?\?|===|\[[^\]]+\]:|-{3,}$|$)")
_ITEM = re.compile(r"(\s*)([-*+]|\d+[.)])\s+")
_MARKER = re.compile(r"([-+*>#|]|\d+[.)]|#+)$")


def wrapped(text: str) -> str:
    """Return the text with its paragraphs and list items wrapped at WIDTH columns."""
    return "".join(f"{line}\n" for line in _lines(text.splitlines()))


def long_lines(text: str) -> list[str]:
    """Return the lines beyond WIDTH columns that could be wrapped."""
    return [line for line in text.splitlines() if len(line) > WIDTH and line not in wrapped(text).splitlines()]


def _lines(lines: list[str]) -> Iterator[str]:
    paragraph: list[str] = []
    fenced = False
    for line in lines:
        if fenced or _FENCE.match(line) or _WHOLE.match(line):
            yield from _wrap(paragraph)
            paragraph = []
            fenced ^= bool(_FENCE.match(line))
            yield line
        elif _ITEM.match(line):
            yield from _wrap(paragraph)
            paragraph = [line]
        else:
            paragraph.append(line)
    yield from _wrap(paragraph)


def _wrap(paragraph: list[str]) -> Iterator[str]:
    if not paragraph:
        return
    item = _ITEM.match(paragraph[0])
    first = item[0] if item else " " * (len(paragraph[0]) - len(paragraph[0].lstrip()))
    words = _words(" ".join(line.strip() for line in [paragraph[0][len(first) :], *paragraph[1:]]))
    line, empty = first, True
    for word in words:
        if not empty and len(line) + 1 + len(word) > WIDTH:
            yield line
            line, empty = " " * len(first), True
        line += word if empty else f" {word}"
        empty = False
    yield line


def _words(text: str) -> list[str]:
    """Split at spaces outside of code and links; what would begin a block at a line's start stays with its left."""
    words: list[str] = []
    for token in _TOKEN.findall(text):
        if words and _MARKER.match(token):
            words[-1] += f" {token}"
        else:
            words.append(token)
    return words


def main() -> int:
    """Wrap the files named on the command line in place."""
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(wrapped(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
