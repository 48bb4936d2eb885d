"""`python -m tools.docs [--check]`: write the generated pages and diagrams, or fail when they have drifted."""

from __future__ import annotations

import sys
from pathlib import Path

from tools import generated
from tools.docs import cli, decisions, diagrams, protocol

ROOT = Path(__file__).parents[2]
FOLDER = Path("docs")


def rendered() -> dict[Path, str]:
    """Return the text of each generated file by its path below the repository's root."""
    pages = {"reference/cli.md": cli.text(), "reference/protocol.md": protocol.text()}
    pages["decisions/README.md"] = decisions.text(ROOT / FOLDER / "decisions")
    pictures = {f"images/{name}.svg": picture for name, picture in diagrams.rendered().items()}
    return {FOLDER / name: text for name, text in (pages | pictures).items()}


def drift(root: Path) -> str:
    """Return a unified diff from the files below `root` to the code; stray diagrams count. Empty: up to date."""
    strays = {path.relative_to(root): "" for path in (root / FOLDER / "images").glob("*.svg")}
    return generated.drift(root, strays | rendered())


def main() -> int:
    """Write the files, or print their drift with --check."""
    return generated.write_or_check("tools.docs", __doc__, ROOT, rendered(), drift)


if __name__ == "__main__":
    sys.exit(main())
