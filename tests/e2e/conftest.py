"""The cluster, the operator and a namespace for each test; at the end `runs/e2e-report.json`.

Without a cluster every test is skipped. A failed test shows the stories of its jobs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.kubernetes.kind import OPERATOR_IMAGE, ROOT, TRAINER_IMAGE, Cluster, Refused, connect
from support.kubernetes.kind_jobs import CORPUS, Place
from support.tools import Programs
from support.worlds.local import write_job

REPORT = Path(os.environ.get("PRETRAIN_E2E_REPORT") or ROOT / "runs" / "e2e-report.json")
ROWS = pytest.StashKey[list[dict[str, Any]]]()


@pytest.fixture(scope="session")
def cluster(cluster_programs: Programs) -> Cluster:
    """A cluster whose nodes have the images."""
    found = connect()
    found.run("examples/kind/load", OPERATOR_IMAGE, TRAINER_IMAGE, timeout=600)
    return found


@pytest.fixture(scope="session")
def operator(cluster: Cluster) -> Cluster:
    """The cluster with the operator of this tree, installed by the chart."""
    cluster.install()
    return cluster


@pytest.fixture(scope="session")
def corpus(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The jobs' corpus in S3."""
    folder = tmp_path_factory.mktemp("corpus")
    write_job(folder)
    cluster.upload(folder, CORPUS)


@pytest.fixture
def place(operator: Cluster, corpus: None, request: pytest.FixtureRequest) -> Iterator[Place]:
    """A namespace for this test, deleted after it."""
    short = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:40].strip("-")
    made = Place(operator, f"e2e-{short}-{os.urandom(3).hex()}")
    try:
        yield made
    finally:
        rows = request.config.stash.setdefault(ROWS, [])
        rows += [
            {
                "test": request.node.name,
                "fault": fault.name,
                "atStep": fault.step,
                "secondsToNextStep": fault.seconds_to_next_step,
                "stepsLost": fault.steps_lost,
                "incidents": [incident.model_dump(mode="json") for incident in fault.incidents],
            }
            for job in made.jobs
            for fault in job.faults
        ]
        made.close()


@pytest.fixture(scope="session")
def undisturbed(operator: Cluster, corpus: None) -> Callable[[], dict[int, float]]:
    """The losses of the job when nothing happens to it: call it; it runs once."""
    known: dict[int, float] = {}

    def losses() -> dict[int, float]:
        if not known:
            alone = Place(operator, f"e2e-undisturbed-{os.urandom(3).hex()}")
            try:
                job = alone.apply()
                job.wait_for_phase("Succeeded", timeout=700)
                known.update(job.losses)
            finally:
                alone.close()
        return known

    return losses


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call" and report.failed:
        place = getattr(item, "funcargs", {}).get("place")
        if isinstance(place, Place):
            for job in place.jobs:
                report.sections.append((f"job {job.name}", job.describe()))
            try:
                report.sections.append(("operator", place.cluster.operator_logs()))
            except Refused as error:
                report.sections.append(("operator", str(error)))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows = session.config.stash.get(ROWS, [])
    if rows:
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        REPORT.write_text(json.dumps(rows, indent=1) + "\n")
