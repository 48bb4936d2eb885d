"""`python -m dashboards [--check]`: write the dashboards and docs/metrics.md, or fail when they have drifted."""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import fleet, job, operating, recovery, reference
from tools import generated

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
    """A unified diff from the files to what they should be, which strays should not; empty when they are up to date."""
    strays = {path.relative_to(root): "" for path in (root / FOLDER).glob("*.json")}
    return generated.drift(root, strays | rendered())


def main() -> int:
    """Write the files, or with --check tell their drift."""
    return generated.write_or_check("dashboards", __doc__, ROOT, rendered(), drift)


if __name__ == "__main__":
    sys.exit(main())
