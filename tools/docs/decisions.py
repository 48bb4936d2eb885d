"""Page docs/decisions/README.md: the index of all decision records."""

from __future__ import annotations

from pathlib import Path

from tools.docs.prose import wrapped

_HEAD = """# Decisions

Generated from the records by `python -m tools.docs`.

Each record is half a page: the decision, its reason, the alternatives, the cost. A later record may replace an earlier
one and says so. Copy the form of a recent record for a new one, with the next number.

| record | decision |
| --- | --- |
"""


def text(folder: Path) -> str:
    """Return the index of the records in `folder`, in the order of their numbers."""
    return wrapped(_HEAD) + "".join(_row(path) for path in sorted(folder.glob("[0-9]*.md")))


def _row(path: Path) -> str:
    number, _, title = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").partition(" ")
    return f"| [{number}]({path.name}) | {title} |\n"
