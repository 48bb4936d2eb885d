"""`python -m dashboards [--check]`: write the dashboards and docs/metrics.md, or fail when they have drifted."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import fleet, job, operating, recovery, reference

ROOT = Path(__file__).parents[1]
FOLDER = Path("charts/pretrain-operator/dashboards")
MADE = {
    "pretrain-fleet.json": fleet.dashboard,
    "pretrain-job.json": job.dashboard,
    "pretrain-recovery.json": recovery.dashboard,
    "pretrain-operator.json": operating.dashboard,
}


def rendered() -> dict[Path, str]:
    """The text of each file, the same for the same code."""
    encoder = JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False)
    made = {FOLDER / name: encoder.encode(make().build()) + "\n" for name, make in MADE.items()}
    return {**made, Path("docs/metrics.md"): reference.text()}


def drift(root: Path) -> str:
    """A unified diff from the files to what they should be; empty when they are up to date."""
    texts = rendered()
    stray = {path.relative_to(root) for path in (root / FOLDER).glob("*.json")}
    diffs: list[str] = []
    for path in sorted(texts.keys() | stray):
        found = (root / path).read_text(encoding="utf-8") if (root / path).exists() else ""
        wanted = texts.get(path, "")
        diffs += difflib.unified_diff(found.splitlines(True), wanted.splitlines(True), str(path), "from the code")
    return "".join(diffs)


def main() -> int:
    """Write the files, or with --check print the diff and return 1 when there is one."""
    parser = argparse.ArgumentParser(prog="python -m dashboards", description=__doc__)
    parser.add_argument("--check", action="store_true", help="print the diff and exit 1 instead of writing")
    if parser.parse_args().check:
        diff = drift(ROOT)
        sys.stdout.write(diff)
        return 1 if diff else 0
    for path, text in rendered().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
