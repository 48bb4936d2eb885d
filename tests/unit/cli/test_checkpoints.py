"""`pretrain checkpoints`, over folders and an S3 service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from pretrain_api.checkpoint.lineage import checkpoint_folder, manifest_key
from pretrain_cli.app import main
from pretrain_store.directory import DirectoryStore
from pretrain_store.history import claim_identity, put_record
from pretrain_store.port import ObjectStore
from support.store.moto import Bucket, moto
from support.store.values import a_record, a_rollback, an_identity, save
from support.worlds.bad_jobs import with_changes


@pytest.fixture(scope="module")
def service() -> Iterator[dict[str, str]]:
    with moto() as environ:
        yield environ


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store whose second generation rolled back from step 30 to 20, and saved step 40."""
    fill(DirectoryStore(tmp_path / "checkpoints"))
    return tmp_path / "checkpoints"


def fill(store: ObjectStore) -> None:
    claim_identity(store, an_identity())
    put_record(store, a_record(1))
    for step in (10, 20, 30):
        save(store, 1, step)
    put_record(store, a_record(2, (1, 20), rollbacks=[a_rollback(2, 20, since=25)]))
    save(store, 2, 40)


def a_run(folder: Path, storage: dict[str, Any], **retain: Any) -> Path:
    """A run's folder with the job that it is of."""
    folder.mkdir(exist_ok=True)
    job = with_changes({"spec.checkpoint.storage": storage, "spec.checkpoint.retain": retain})
    (folder / "job.yaml").write_text(json.dumps(job))
    return folder


def pretrain_checkpoints(*arguments: object, **environ: str) -> Result:
    return CliRunner().invoke(main, ["checkpoints", *map(str, arguments)], env={"COLUMNS": "200", **environ})


def listed(*arguments: object, **environ: str) -> dict[str, Any]:
    shown = pretrain_checkpoints(*arguments, "--json", **environ)
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.stdout)


def standing(history: dict[str, Any]) -> dict[int, str]:
    return {item["step"]: item["standing"] for item in history["checkpoints"]}


STANDING = {10: "in lineage", 20: "in lineage", 30: "rolled back", 40: "current"}


def test_a_run_shows_its_history_as_a_table_newest_first(tmp_path: Path, folder: Path) -> None:
    run = a_run(tmp_path, {"path": str(folder)}, pin=[10])

    shown = pretrain_checkpoints(run)

    assert shown.exit_code == 0, shown.output
    title, _, *rows, rollback = shown.stdout.splitlines()
    assert title.strip() == f"folder {folder}, generation 2"
    assert [" ".join(row.split()) for row in rows] == [
        "40 2 1 0 0.0 – current",
        "30 1 1 0 0.0 – rolled back",
        "20 1 1 0 0.0 – in lineage",
        "10 1 1 0 0.0 – in lineage, pinned",
    ]
    assert rollback == "generation 2 rolled back to step 20: LossSpike at step 27, since step 25"


def test_the_history_for_programs(tmp_path: Path, folder: Path) -> None:
    history = listed(a_run(tmp_path, {"path": str(folder)}, pin=[10]))

    assert standing(history) == STANDING
    assert (history["store"], history["generation"]) == (f"folder {folder}", 2)
    assert [item["pinned"] for item in history["checkpoints"]] == [True, False, False, False]
    assert history["checkpoints"][0] == {
        "key": manifest_key(1, 10), "step": 10, "generation": 1, "standing": "in lineage", "pinned": True,
        "tokens": 0, "workers": 1, "bytes": 5, "savedAt": None, "damage": None,
    }  # fmt: skip
    assert [rollback["toStep"] for rollback in history["rollbacks"]] == [20]


def test_the_stores_own_folder_is_shown_without_pins(folder: Path) -> None:
    history = listed(folder)

    assert standing(history) == STANDING
    assert {item["pinned"] for item in history["checkpoints"]} == {None}


def test_a_runs_folder_may_have_been_moved(tmp_path: Path, folder: Path) -> None:
    run = a_run(tmp_path, {"path": f"/gone/{folder.name}"})

    assert standing(listed(run)) == STANDING


@pytest.mark.parametrize("by", ["uri", "job file"])
def test_s3_is_read_with_what_the_environment_says(by: str, service: dict[str, str], tmp_path: Path) -> None:
    bucket = Bucket(service, f"runs-{by[:3]}")
    bucket.create()
    fill(DirectoryStore(tmp_path / "local"))
    bucket.upload(tmp_path)
    job = a_run(tmp_path, {"s3": {"bucket": bucket.name, "prefix": "local"}}) / "job.yaml"

    history = listed(f"s3://{bucket.name}/local" if by == "uri" else job, "--verify", **service)

    assert standing(history) == STANDING
    assert history["store"] == f"s3://{bucket.name}/local"
    assert history["verified"]


def test_verify_finds_what_is_not_what_was_saved(folder: Path) -> None:
    def shard(generation: int, step: int) -> Path:
        return folder / checkpoint_folder(generation, step) / "shard.distcp"

    assert listed(folder, "--verify")["checkpoints"][3]["damage"] is None
    shard(1, 20).write_bytes(b"shart")
    shard(2, 40).unlink()

    shown = pretrain_checkpoints(folder, "--verify")
    said = json.loads(pretrain_checkpoints(folder, "--verify", "--json").stdout)

    assert shown.exit_code == 1
    assert "shard.distcp is missing" in shown.stdout
    assert [item["damage"] for item in said["checkpoints"]] == [
        None,
        "shard.distcp has another sha256 than was saved",
        None,
        "shard.distcp is missing",
    ]
    assert pretrain_checkpoints(folder).exit_code == 0  # nobody asked


def test_a_manifest_that_cannot_be_read_is_said_to_be_damaged(folder: Path) -> None:
    (folder / manifest_key(1, 20)).write_text("{}")

    shown = pretrain_checkpoints(folder)

    assert shown.exit_code == 1
    assert "the manifest cannot be read" in shown.stdout


def test_nothing_is_changed(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    listed(folder, "--verify")

    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_history_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "checkpoints")
    put_record(store, a_record(1))

    shown = pretrain_checkpoints(tmp_path / "checkpoints")

    assert (shown.exit_code, shown.stdout) == (1, "")
    assert shown.stderr == f"folder {tmp_path}/checkpoints has no checkpoint yet; latest generation: 1\n"


def test_what_is_no_store_is_refused_with_the_remedy(service: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    Bucket(service, "bare").create()
    unstarted = a_run(tmp_path / "unstarted", {"path": str(tmp_path / "nowhere")})
    refused = {
        tmp_path / "absent": f"there is no {tmp_path}/absent: give a run's folder, a job file, or",
        tmp_path / "empty": f"{tmp_path}/empty is neither the folder of a run, since it has no job.yaml, nor",
        unstarted: f"there is no {tmp_path}/nowhere, the checkpoint folder of {unstarted}: start the run",
        "s3://bare/run": "s3://bare/run holds no run: give the checkpoint.storage of a run",
        "s3://absent-bucket/run": "NoSuchBucket",
        "s3://A_B": "s3://A_B is not s3://BUCKET/PREFIX",
    }

    for name, said in refused.items():
        shown = pretrain_checkpoints(name, **service)
        assert shown.exit_code == 2, (name, shown.output)
        assert said in shown.stderr
        assert len(shown.stderr.splitlines()) == 1


def test_a_service_that_is_away_is_no_mistake_of_the_command(tmp_path: Path) -> None:
    away = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}

    shown = pretrain_checkpoints("s3://runs/one", **away)

    assert shown.exit_code == 1
    assert "cannot read the history" in shown.stderr
