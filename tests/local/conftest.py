from __future__ import annotations

from pathlib import Path

import pytest

from support.worlds.local import Baseline, write_job


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job file with its corpus; read only."""
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="session")
def baseline(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    """The job undisturbed."""
    return Baseline(job, tmp_path_factory.mktemp("baseline"))
