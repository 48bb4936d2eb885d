"""The chart as helm renders it."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
CHART = ROOT / "charts" / "pretrain-operator"
PREBUILT = Path(os.environ.get("PRETRAIN_TEST_CLUSTER") or ROOT.parent / "shared" / "cluster")
Object = dict[str, Any]


@cache
def helm() -> str:
    """The program, from PATH or the prebuilt cluster's tools; skips the test where there is none."""
    found = shutil.which("helm")
    if found is None and (PREBUILT / "tools").exists():
        tools = subprocess.run([PREBUILT / "tools"], check=True, capture_output=True, text=True, timeout=240).stdout
        found = shutil.which("helm", path=tools.strip())
    if found is None:
        pytest.skip(f"helm is neither on PATH nor below {PREBUILT} (PRETRAIN_TEST_CLUSTER)")
    return found


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
