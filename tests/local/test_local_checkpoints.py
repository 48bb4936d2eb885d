"""Whole runs against damaged checkpoints, a prefix of another job, and an S3 service."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from support.worlds.local import TOLERANCE, Baseline, run

SHORT = ("--set", "training.steps=50")
LONGER = ("--set", "training.steps=70")
BUCKET = "local-checkpoints"  # moto keeps buckets for the whole process: another test has "runs"


@pytest.fixture(scope="session")
def trained(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 50 steps with checkpoints of steps 20, 40 and 50; read only."""
    out = tmp_path_factory.mktemp("trained")
    finished = run(job, out, *SHORT)
    assert finished.code == 0, finished.explain()
    return out


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 service with a bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket=BUCKET)
    yield endpoint
    server.stop()


def newest(out: Path) -> Path:
    """The folder of the newest checkpoint."""
    return max((out / "checkpoints" / "checkpoints").glob("g*/step-*"))


def test_a_corrupt_newest_checkpoint_is_passed_over_and_said(
    job: Path, trained: Path, baseline: Baseline, tmp_path: Path
) -> None:
    out = shutil.copytree(trained, tmp_path / "out")
    shard = next(newest(out).glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)

    finished = run(job, out, *LONGER)

    assert finished.code == 0, finished.explain()
    assert [(i.cause, i.action) for i in finished.report.incidents] == [("CheckpointCorrupt", "FellBack")]
    assert "step-000000050" in finished.report.incidents[0].message
    assert finished.report.generations[-1].started_at_step == 40
    assert baseline.difference(finished.losses) < TOLERANCE


def test_a_run_whose_checkpoints_are_all_damaged_fails_and_deletes_nothing(
    job: Path, trained: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(trained, tmp_path / "out")
    for shard in (out / "checkpoints").rglob("*.distcp"):
        shard.write_bytes(b"")
    manifests = set((out / "checkpoints").rglob("manifest.json"))

    finished = run(job, out, *LONGER)

    assert finished.code == 1, finished.explain()
    assert "NoUsableCheckpoint" in finished.stdout + finished.stderr
    assert set((out / "checkpoints").rglob("manifest.json")) == manifests


def test_the_prefix_of_another_model_is_refused(job: Path, trained: Path, tmp_path: Path) -> None:
    before = sorted(path for path in trained.rglob("*") if path.is_file())

    finished = run(
        job, tmp_path, "--set", f"checkpoint.storage.path={trained / 'checkpoints'}", "--set", "training.model.width=64"
    )

    assert finished.code == 2, finished.explain()
    assert "model" in finished.stderr
    assert sorted(path for path in trained.rglob("*") if path.is_file()) == before


def test_checkpoints_in_s3_survive_a_killed_worker(job: Path, baseline: Baseline, s3: str, tmp_path: Path) -> None:
    storage = f"checkpoint.storage={{s3: {{bucket: {BUCKET}, prefix: tiny, endpoint: '{s3}'}}}}"

    finished = run(job, tmp_path, *LONGER, "--set", storage, "--fault", "kill:worker=0,step=50")

    assert finished.code == 0, finished.explain()
    assert [incident.cause for incident in finished.report.incidents] == ["WorkerLost"]
    assert baseline.difference(finished.losses) < TOLERANCE
    keys = [
        item["Key"]
        for item in boto3.client("s3", endpoint_url=s3, region_name="us-east-1").list_objects_v2(Bucket=BUCKET)[
            "Contents"
        ]
    ]
    assert "tiny/job.json" in keys
    assert any(key.endswith("step-000000070/manifest.json") for key in keys)
