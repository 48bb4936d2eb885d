from __future__ import annotations

from pathlib import Path

import pytest

from support.worlds.local import Finished, run
from support.worlds.old import continued_losses, old_code, old_run


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of the old commit; read only."""
    return old_code(tmp_path_factory.mktemp("old") / "code")


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The place of a stopped run of the old commit, for one test to change."""
    return old_run(tmp_path / "stopped")


@pytest.fixture(scope="session")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """That run, resumed by the code under test as far as the old code went; read only."""
    place = old_run(tmp_path_factory.mktemp("resumed") / "place")
    return run(place / "job.yaml", place / "run", "--set", f"training.steps={max(continued_losses())}")
