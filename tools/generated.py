"""Generated files: write them, or report their drift from the code."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path


def drift(root: Path, texts: Mapping[Path, str]) -> str:
    """Return a unified diff from the files below `root` to these texts; empty if they are up to date."""
    diffs: list[str] = []
    for path, wanted in sorted(texts.items()):
        found = (root / path).read_text(encoding="utf-8") if (root / path).exists() else ""
        diffs += difflib.unified_diff(found.splitlines(True), wanted.splitlines(True), str(path), "from the code")
    return "".join(diffs)


def write_or_check(
    program: str, about: str | None, root: Path, texts: Mapping[Path, str], drift: Callable[[Path], str]
) -> int:
    """Write the files, or with --check print their drift and return 1 if there is any."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=about)
    parser.add_argument("--check", action="store_true", help="print the diff and exit 1 instead of writing")
    if parser.parse_args().check:
        diff = drift(root)
        sys.stdout.write(diff)
        return 1 if diff else 0
    for path, text in texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return 0
