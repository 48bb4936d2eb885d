"""What is wrong with data or storage is said before anything starts, with the field and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pretrain_api.dataset import DATASET_FILE
from pretrain_api.problems import InvalidJob
from pretrain_api.spec.job import PretrainJob, Storage
from pretrain_cli.inputs.preflight import ResolvedJob, check, resolve_uris
from pretrain_data.verification import check_shards
from pretrain_data.writer import train_tokenizer, write_dataset
from pretrain_store.history import claim_identity
from pretrain_store.open import open_store
from support.store.moto import Bucket, moto
from support.worlds.bad_jobs import with_changes

TEXTS = [f"the quick brown fox number {number} jumps over the lazy dog" for number in range(40)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/tokenizer.json and a source in data/web; not to be changed."""
    folder = tmp_path_factory.mktemp("corpus")
    file = folder / "data" / "tokenizer.json"
    tokenizer = train_tokenizer(TEXTS, 300, file)
    write_dataset(TEXTS, tokenizer, folder / "data" / "web", file)
    return folder


@pytest.fixture
def data(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus that a test may spoil; the job file would be beside `data`."""
    for path in sorted(corpus.rglob("*")):
        copy = tmp_path / path.relative_to(corpus)
        copy.mkdir() if path.is_dir() else copy.write_bytes(path.read_bytes())
    return tmp_path / "data"


def checked(data: Path, changes: dict[str, Any] | None = None) -> ResolvedJob:
    job = PretrainJob.model_validate(with_changes(changes or {}))
    return check(resolve_uris(job, data.parent / "job.yaml", data.parent / "out"), {})


def refused(data: Path, changes: dict[str, Any] | None = None) -> dict[str, str]:
    with pytest.raises(InvalidJob) as refusal:
        checked(data, changes)
    return {problem.path: problem.message for problem in refusal.value.problems}


def describe(data: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the source's dataset.json."""
    file = data / "web" / DATASET_FILE
    description = json.loads(file.read_text())
    change(description)
    file.write_text(json.dumps(description))


def replace_in_description(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda description: description.update(fields)


URI = "spec.training.data.sources[0].uri"


def test_good_data_is_resolved_to_absolute_paths(data: Path) -> None:
    resolved = checked(data)

    training = resolved.job.spec.training.data
    assert training.tokenizer == str(data / "tokenizer.json")
    assert training.sources[0].uri == str(data / "web")
    assert resolved.job.spec.checkpoint.storage.path == str(data.parent / "out" / "checkpoints")
    assert resolved.datasets[0].tokens > 33
    assert resolved.warnings == ()


def test_a_resolved_job_is_a_job(data: Path) -> None:
    job = checked(data, {"spec.training.evaluation": {"sources": [{"name": "a", "uri": "data/web"}]}}).job

    assert PretrainJob.from_json(job.to_json()) == job


def test_resolving_changes_nothing_but_uris(data: Path) -> None:
    resolved = checked(data, {"spec.training.data.maskDocuments": True})

    assert resolved.job.spec.training.data.mask_documents


def test_nothing_is_left_behind(data: Path) -> None:
    before = sorted(data.parent.rglob("*"))

    checked(data)

    assert sorted(data.parent.rglob("*")) == before


def test_file_uris_are_paths(data: Path) -> None:
    assert checked(data, {"spec.training.data.tokenizer": f"file://{data}/tokenizer.json"})


@pytest.mark.parametrize(
    ("uri", "message"), [("http://a/b", "http://: unknown scheme"), ("file://data/web", "file:///")]
)
def test_a_uri_of_another_kind_is_refused(data: Path, uri: str, message: str) -> None:
    assert message in refused(data, {"spec.training.data.tokenizer": uri})["spec.training.data.tokenizer"]


class InS3:
    """The corpus in the bucket `corpus` of a service, and a job that names it."""

    changes: ClassVar[dict[str, Any]] = {
        "spec.training.data": {
            "tokenizer": "s3://corpus/tokenizer.json",
            "sources": [{"name": "web", "uri": "s3://corpus/web/"}],
        }
    }

    def __init__(self, environ: dict[str, str]) -> None:
        self.environ, self.bucket = environ, Bucket(environ)

    def checked(self, data: Path) -> ResolvedJob:
        job = PretrainJob.model_validate(with_changes(self.changes))
        return check(resolve_uris(job, data.parent / "job.yaml", data.parent / "out"), self.environ)

    def refused(self, data: Path) -> dict[str, str]:
        with pytest.raises(InvalidJob) as refusal:
            self.checked(data)
        return {problem.path: problem.message for problem in refusal.value.problems}


@pytest.fixture
def in_s3(data: Path) -> Iterator[InS3]:
    with moto() as environ:
        found = InS3(environ)
        found.bucket.create()
        found.bucket.upload(data)
        yield found


def test_data_in_s3_is_checked_where_it_is(in_s3: InS3, data: Path) -> None:
    resolved = in_s3.checked(data)

    assert resolved.job.spec.training.data.sources[0].uri == "s3://corpus/web/"
    assert resolved.datasets == checked(data).datasets
    assert resolved.identity == checked(data).identity


def test_data_in_s3_that_is_missing_is_said_with_the_field(in_s3: InS3, data: Path) -> None:
    in_s3.bucket.delete("tokenizer.json")
    in_s3.bucket.delete(f"web/{DATASET_FILE}")

    assert in_s3.refused(data) == {
        "spec.training.data.tokenizer": "there is no s3://corpus/tokenizer.json: correct the URI, or upload it first",
        URI: f"there is no s3://corpus/web/{DATASET_FILE}: correct the URI, or upload it first",
    }


@pytest.mark.parametrize(
    ("content", "message"), [(b"short", "has 5 bytes, expected"), (None, "there is no shard s3://corpus/web/00000.bin")]
)
def test_a_shard_in_s3_of_another_size_is_refused(in_s3: InS3, data: Path, content: bytes | None, message: str) -> None:
    in_s3.bucket.delete("web/00000.bin")
    if content is not None:
        in_s3.bucket.put("web/00000.bin", content)

    assert message in in_s3.refused(data)[URI]


def test_a_service_that_does_not_answer_is_said_with_the_field(data: Path) -> None:
    nowhere = InS3({"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"})

    found = nowhere.refused(data)

    assert set(found) == {"spec.training.data.tokenizer", URI}
    assert "cannot be read (s3://corpus/web: Could not connect" in found[URI]


def test_everything_missing_is_said_at_once(tmp_path: Path) -> None:
    found = refused(tmp_path / "data", {"spec.training.precision": "fp8"})

    assert set(found) == {"spec.training.precision", "spec.training.data.tokenizer", URI}
    assert "cannot be read (No such file" in found["spec.training.data.tokenizer"]
    assert f"there is no folder {tmp_path / 'data' / 'web'}" in found[URI]


@pytest.mark.parametrize("content", [b"{}", b"no json", b"\xff", b""])
def test_a_file_that_is_no_tokeniser_is_refused(data: Path, content: bytes) -> None:
    (data / "tokenizer.json").write_bytes(content)

    assert "is not a tokenizer.json" in refused(data)["spec.training.data.tokenizer"]


def test_another_tokeniser_than_the_datas_is_refused(data: Path) -> None:
    train_tokenizer(TEXTS, 290, data / "tokenizer.json")

    assert "was built with another tokeniser" in refused(data)[URI]


def test_a_folder_without_a_description_is_refused(data: Path) -> None:
    (data / "web" / DATASET_FILE).unlink()

    assert f"{DATASET_FILE} cannot be read (No such file" in refused(data)[URI]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"dtype": "float"}'])
def test_a_description_that_is_none_is_refused(data: Path, content: str) -> None:
    (data / "web" / DATASET_FILE).write_text(content)

    assert "is not a dataset description" in refused(data)[URI]


def test_an_empty_source_is_refused(data: Path) -> None:
    describe(data, replace_in_description(shards=[]))

    assert "is empty: add data" in refused(data)[URI]


def test_a_truncated_shard_is_refused(data: Path) -> None:
    shard = data / "web" / "00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])

    assert "is truncated" in refused(data)[URI]


def test_a_shard_that_is_too_long_is_refused(data: Path) -> None:
    shard = data / "web" / "00000.bin"
    shard.write_bytes(shard.read_bytes() + b"aa")

    assert "is too long" in refused(data)[URI]


def test_a_missing_shard_is_refused(data: Path) -> None:
    (data / "web" / "00000.bin").unlink()

    assert "00000.bin cannot be read" in refused(data)[URI]


def test_a_changed_byte_is_found(data: Path) -> None:
    shard = data / "web" / "00000.bin"
    shard.write_bytes(b"\x01" + shard.read_bytes()[1:])

    assert "different sha256" in refused(data)[URI]


def test_big_data_is_not_hashed(data: Path) -> None:
    dataset = checked(data).datasets[0]
    shard = data / "web" / "00000.bin"
    shard.write_bytes(b"\x01" + shard.read_bytes()[1:])
    sources = [("field", str(data / "web"), dataset)]

    assert list(check_shards(sources, hash_limit=2 * dataset.tokens - 1)) == []
    assert len(list(check_shards(sources, hash_limit=2 * dataset.tokens))) == 1


def test_a_vocabulary_below_the_tokenisers_is_refused(data: Path) -> None:
    model = {"preset": "gpt2-tiny", "vocabulary": 299}

    found = refused(data, {"spec.training.model": model})["spec.training.model.vocabulary"]
    assert found.startswith("299 is smaller than the tokeniser's vocabulary of 300")


def test_a_vocabulary_of_the_tokenisers_size_is_enough(data: Path) -> None:
    assert checked(data, {"spec.training.model": {"preset": "gpt2-tiny", "vocabulary": 300}})


def test_a_vocabulary_that_the_data_cannot_hold_is_refused(data: Path) -> None:
    describe(data, replace_in_description(vocabulary=65_537))

    assert "uint16 cannot hold" in refused(data)[URI]


def test_a_context_longer_than_every_shard_is_refused(data: Path) -> None:
    tokens = checked(data).datasets[0].tokens

    found = refused(data, {"spec.training.model": {"preset": "gpt2-tiny", "context": tokens}})
    assert f"the longest of {data / 'web'} has {tokens}" in found["spec.training.model.context"]
    assert checked(data, {"spec.training.model": {"preset": "gpt2-tiny", "context": tokens - 1}})


def test_an_evaluation_of_the_users_own_is_found_beside_the_job_file(data: Path) -> None:
    def with_hook(hook: str) -> dict[str, Any]:
        return {"spec.training.evaluation": {"sources": [{"name": "a", "uri": "data/web"}], "hook": hook}}

    (data.parent / "mine.py").write_text("def endings(trained): return {}")
    (data.parent / "broken.py").write_text("def endings(")

    found = checked(data, with_hook("mine.py:endings")).job.spec.training.evaluation
    assert found is not None
    assert found.hook == f"{data.parent / 'mine.py'}:endings"
    named = checked(data, with_hook("package.module:endings")).job.spec.training.evaluation
    assert named is not None
    assert named.hook == "package.module:endings"
    for hook, said in (
        ("gone.py:endings", "cannot be read (No such file"),
        ("broken.py:endings", "is not valid Python ("),
    ):
        assert said in refused(data, with_hook(hook))["spec.training.evaluation.hook"]


def test_held_out_sources_are_checked_too(data: Path) -> None:
    found = refused(data, {"spec.training.evaluation": {"sources": [{"name": "a", "uri": "nowhere"}]}})

    assert set(found) == {"spec.training.evaluation.sources[0].uri"}


def test_a_storage_below_a_file_is_refused(data: Path) -> None:
    (data.parent / "out").write_text("")

    assert "is a file: choose a writable folder" in refused(data)["spec.checkpoint.storage.path"]


def test_a_storage_that_cannot_be_written_is_refused(data: Path) -> None:
    found = refused(data, {"spec.checkpoint.storage": {"path": "/proc/1/pretrain"}})

    assert "/proc/1 is not writable" in found["spec.checkpoint.storage.path"]


def test_a_place_that_belongs_to_another_job_is_refused(data: Path) -> None:
    resolved = checked(data)
    claim_identity(open_store(resolved.job.spec.checkpoint.storage, {}), resolved.identity)

    assert checked(data).identity == resolved.identity
    found = refused(data, {"spec.training.seed": 2})["spec.checkpoint.storage.path"]
    assert "belongs to another job with different training.seed" in found


def test_warnings_do_not_stop_a_job(data: Path) -> None:
    resolved = checked(data, {"spec.workers.elastic": {"growCooldown": "10s"}})

    assert [finding.path for finding in resolved.warnings] == ["spec.workers.elastic.growCooldown"]


def test_what_a_job_starts_from_is_looked_at_and_a_runs_folder_stands_for_its_checkpoints(data: Path) -> None:
    run = data.parent / "earlier" / "checkpoints"
    claim_identity(open_store(Storage(path=str(run)), {}), checked(data).identity)

    nothing = refused(data, {"spec.training.from": {"run": "nowhere"}})
    no_checkpoint = refused(data, {"spec.training.from": {"run": "earlier"}})
    no_folder = refused(data, {"spec.training.from": {"huggingFace": "earlier"}})

    assert nothing["spec.training.from.run"].startswith(f"{data.parent / 'nowhere'} holds no run: ")
    assert no_checkpoint["spec.training.from.run"].startswith(f"{run} holds no checkpoint yet: ")
    assert "has no config.json" in no_folder["spec.training.from.huggingFace"]
    assert [path.name for path in run.iterdir() if path.name != ".tmp"] == ["job.json"]


def test_states_that_do_not_fit_the_machines_memory_are_refused(data: Path) -> None:
    large = {"spec.training.model": {"preset": "llama-70b"}, "spec.checkpoint.memory": {"everySteps": 10}}

    said = refused(data, large)

    assert "workers keep" in said["spec.checkpoint.memory"]
    assert "leave checkpoint.memory out" in said["spec.checkpoint.memory"]
    assert checked(data, {"spec.checkpoint.memory": {"everySteps": 10}})
