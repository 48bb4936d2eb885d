"""The chart as helm renders it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from support.tools import HELM, require

ROOT = Path(__file__).parents[3]
CHART = ROOT / "charts" / "pretrain-operator"
Object = dict[str, Any]


def helm() -> str:
    """Path of the program; skips the test where there is none."""
    return str(require(HELM)["helm"])


def template(*settings: str, release: str = "release", namespace: str = "pretrain-system") -> str:
    """What helm makes of the chart with these values. Raises ValueError with what helm said."""
    options = [option for setting in settings for option in ("--set", setting)]
    command = [helm(), "template", release, str(CHART), "--namespace", namespace, *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if ran.returncode:
        raise ValueError(ran.stderr)
    return ran.stdout


def objects(*settings: str, release: str = "release", namespace: str = "pretrain-system") -> dict[str, Object]:
    """The objects by kind and name."""
    rendered = yaml.load_all(template(*settings, release=release, namespace=namespace), yaml.CSafeLoader)
    return {f"{it['kind']}/{it['metadata']['name']}": it for it in rendered if it}
