"""`python -m dashboards [--check]`: write the dashboards and docs/metrics.md, or fail if they have drifted."""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import fleet, job, operator_health, recovery, reference
from tools import generated

ROOT = Path(__file__).parents[1]
FOLDER = Path("charts/pretrain-operator/dashboards")
MADE = {
    "pretrain-fleet.json": fleet.dashboard,
    "pretrain-job.json": job.dashboard,
    "pretrain-recovery.json": recovery.dashboard,
    "pretrain-operator.json": operator_health.dashboard,
}


def rendered() -> dict[Path, str]:
    """Render each file, deterministically."""
    encoder = JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False)
    made = {FOLDER / name: encoder.encode(make().build()) + "\n" for name, make in MADE.items()}
    return {**made, Path("docs/metrics.md"): reference.text()}


def drift(root: Path) -> str:
    """Return a unified diff from the files to the rendered ones, stray files included; empty if up to date."""
    strays = {path.relative_to(root): "" for path in (root / FOLDER).glob("*.json")}
    return generated.drift(root, strays | rendered())


def main() -> int:
    """Write the files, or with --check report their drift."""
    return generated.write_or_check("dashboards", __doc__, ROOT, rendered(), drift)


if __name__ == "__main__":
    sys.exit(main())
