"""An obstacle outside the job is reported once and waited for; then training resumes in the same process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pretrain_api.dataset import DATASET_FILE
from pretrain_api.messages import reports
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_store import errors as store
from pretrain_trainer.checkpoint import Checkpointer
from pretrain_trainer.core.collectives import Collectives
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.errors import (
    AccessDeniedError,
    BucketMissingError,
    DataDelayed,
    DataMissing,
    InvalidInput,
    ObstacleError,
    StorageUnavailable,
)
from pretrain_trainer.core.ranks import Ranks, process_group
from pretrain_trainer.core.waits import ObstacleRetry, obstacle_behind
from pretrain_trainer.loop.train import train
from support.store.moto import CORPUS, Bucket, moto
from support.trainer.checkpoint import on_rank
from support.trainer.remote import RUNS, MendingLink, a_remote_config
from support.trainer.world import FakeLink, NoCheckpointer, a_config, a_corpus, run_ranks, run_training

# --- rules ------------------------------------------------------------------------------------------------------------


class Act:
    """Raises these in turn, then returns 7."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def __call__(self) -> int:
        if self.errors:
            raise self.errors.pop(0)
        return 7


@pytest.fixture
def alone() -> Iterator[None]:
    with process_group(Environment.of({})):
        yield


def waited(act: Act, speaks: bool = True) -> tuple[list[Any], list[float]]:
    """The reports and the pauses until the act succeeded."""
    link, pauses = FakeLink(), list[float]()
    assert ObstacleRetry(link, speaks, Collectives(None), pauses.append).retry_until_clear(act) == 7
    return link.reports, pauses


@pytest.mark.usefixtures("alone")
class TestWaiting:
    def test_a_first_success_is_not_reported(self) -> None:
        assert waited(Act()) == ([], [])

    def test_an_obstacle_is_reported_once_and_retried_with_growing_pauses(self) -> None:
        said, pauses = waited(Act(*[DataMissing("there is no web: upload it")] * 2000))

        assert said == [
            reports.Blocked(reason="DataMissing", message="there is no web: upload it"),
            reports.Unblocked(),
        ]
        assert pauses == [1, 2, 4, 8, *[10] * 1996]

    def test_another_obstacle_is_reported_too(self) -> None:
        said, _ = waited(
            Act(BucketMissingError("a"), BucketMissingError("a"), AccessDeniedError("a"), AccessDeniedError("b"))
        )

        assert [(body.kind, getattr(body, "reason", ""), getattr(body, "message", "")) for body in said] == [
            ("blocked", "BucketMissing", "a"),
            ("blocked", "AccessDenied", "a"),
            ("blocked", "AccessDenied", "b"),
            ("unblocked", "", ""),
        ]

    def test_a_rank_that_does_not_report_waits_in_silence(self) -> None:
        assert waited(Act(DataMissing("a")), speaks=False) == ([], [1])

    def test_a_delay_is_retried_without_a_pause(self) -> None:
        said, pauses = waited(Act(DataDelayed("a"), DataDelayed("a")))

        assert ([body.kind for body in said], pauses) == (["blocked", "unblocked"], [])

    def test_bad_input_is_not_waited_for(self) -> None:
        with pytest.raises(InvalidInput):
            waited(Act(DataMissing("a"), InvalidInput("b")))


@pytest.mark.parametrize(
    ("error", "obstacle"),
    [
        (store.NoSuchBucket("x"), BucketMissingError),
        (store.CredentialsRejected("x"), AccessDeniedError),
        (store.StoreUnavailable("x"), StorageUnavailable),
        (store.StoreRefused("x"), None),
        (store.ConditionalPutUnsupported("x"), None),
        (store.ObjectNotFound("x"), None),
    ],
)
def test_only_a_condition_fixed_outside_the_job_is_an_obstacle(
    error: store.StoreError, obstacle: type[ObstacleError] | None
) -> None:
    found = obstacle_behind(error)

    assert (type(found) if found else None) is obstacle
    assert found is None or str(found).startswith("x: ")


def test_an_obstacle_has_one_remedy() -> None:
    wrapped = store.CredentialsRejected("checkpoint.storage cannot be used: no; allow reading")
    wrapped.__cause__ = store.CredentialsRejected("no")

    assert str(obstacle_behind(wrapped)).startswith("no: grant")


def test_all_ranks_wait_for_one_and_rank_0_reports_for_it() -> None:
    ends = run_ranks(3, on_rank, _blocked_on_rank_two)

    said = [("blocked", "DataMissing", "rank 2 misses it"), ("unblocked", "", "")]
    assert ends == [(7, said, [1, 2]), (7, [], [1, 2]), (7, [], [1, 2])]


def _blocked_on_rank_two(ranks: Ranks) -> tuple[int, list[tuple[str, str, str]], list[float]]:
    act = Act(DataMissing("rank 2 misses it"), DataMissing("rank 2 misses it")) if ranks.rank == 2 else Act()
    link, pauses = FakeLink(), list[float]()
    result = ObstacleRetry(link, ranks.first, Collectives(None), pauses.append).retry_on_all_ranks(act)
    said = [(body.kind, getattr(body, "reason", ""), getattr(body, "message", "")) for body in link.reports]
    return result, said, pauses


# --- training from S3 -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(corpus: Path) -> list[float]:
    """The losses of the same run over folders."""
    return trained(a_config(corpus), {}).losses


@pytest.fixture
def environ(corpus: Path) -> Iterator[dict[str, str]]:
    """A service that has the corpus."""
    with moto() as environ:
        bucket = Bucket(environ)
        bucket.create()
        bucket.upload(corpus)
        Bucket(environ, RUNS).create()
        yield environ


def trained(config: TrainerConfig, environ: Mapping[str, str], **menders: Any) -> MendingLink:
    """The link of a run to its end, in this process; each obstacle is fixed as soon as it is reported."""
    link = MendingLink(menders=menders)
    train(
        config,
        link,
        Checkpointer.open if config.checkpoint.storage.s3 else lambda *_: NoCheckpointer(),
        Environment.of(environ),
    )
    return link


def in_s3(environ: Mapping[str, str], bucket: str = RUNS) -> dict[str, Any]:
    storage = {"s3": {"bucket": bucket, "prefix": "run", "endpoint": environ["AWS_ENDPOINT_URL"]}}
    return {"storage": storage, "interval": {"steps": 2}}


def test_training_from_s3_is_bit_equal_to_training_from_folders(
    environ: dict[str, str], tmp_path: Path, undisturbed: list[float]
) -> None:
    held_out = {"every": 3, "sources": [{"name": "held-out", "uri": f"s3://{CORPUS}/held-out"}]}

    link = trained(a_remote_config(tmp_path, {"evaluation": held_out}), environ)

    assert link.losses == undisturbed
    assert link.said == []
    assert [set(body.losses) for body in link.reports if isinstance(body, reports.Evaluated)] == [{"held-out"}] * 2
    (restored,) = [body for body in link.reports if isinstance(body, reports.Restored)]
    assert restored.unigram_loss is not None


def test_a_cache_with_room_for_one_shard_changes_nothing_but_the_time(
    environ: dict[str, str], tmp_path: Path, undisturbed: list[float]
) -> None:
    config = a_remote_config(tmp_path, cache={"path": str(tmp_path / "cache"), "bytes": 6000})

    assert trained(config, environ).losses == undisturbed
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 1


def test_two_ranks_train_from_s3_with_one_cache(
    environ: dict[str, str], tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    plain = run_training(a_config(corpus), 2)

    remote = run_ranks(2, _train_with_environment, a_remote_config(tmp_path), environ)

    assert remote[0] == plain[0].losses
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 3


def _train_with_environment(ranks: Mapping[str, str], config: TrainerConfig, environ: Mapping[str, str]) -> list[float]:
    link = MendingLink()
    train(config, link, lambda *_: NoCheckpointer(), Environment.of({**ranks, **environ}))
    return link.losses


def test_a_missing_source_is_waited_for(
    environ: dict[str, str], tmp_path: Path, corpus: Path, undisturbed: list[float]
) -> None:
    key, bucket = f"code/{DATASET_FILE}", Bucket(environ)
    bucket.delete(key)

    link = trained(a_remote_config(tmp_path), environ, DataMissing=lambda: bucket.put(key, (corpus / key).read_bytes()))

    assert link.said == ["DataMissing", "-"]
    assert link.reports[0].message == (
        f"training.data.sources[code].uri: there is no s3://{CORPUS}/{key}: upload it; "
        "training resumes by itself when it exists"
    )
    assert link.losses == undisturbed


def test_a_missing_tokeniser_is_waited_for(environ: dict[str, str], tmp_path: Path, corpus: Path) -> None:
    bucket = Bucket(environ)
    bucket.delete("tokenizer.json")

    link = trained(a_remote_config(tmp_path), environ, DataMissing=lambda: bucket.upload(corpus))

    assert link.said == ["DataMissing", "-"]
    assert link.reports[0].message.startswith(f"training.data.tokenizer: there is no s3://{CORPUS}/tokenizer.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff"])
def test_an_invalid_description_is_waited_for(
    environ: dict[str, str], tmp_path: Path, corpus: Path, content: bytes
) -> None:
    bucket = Bucket(environ)
    bucket.put(f"code/{DATASET_FILE}", content)

    link = trained(a_remote_config(tmp_path), environ, DataCorrupt=lambda: bucket.upload(corpus))

    assert link.said == ["DataCorrupt", "-"]


@pytest.mark.parametrize("content", [b"poison" * 1000, b"\0" * 5998, None])
def test_a_shard_that_is_poisoned_truncated_or_missing_is_waited_for_and_never_trained_on(
    environ: dict[str, str], tmp_path: Path, corpus: Path, undisturbed: list[float], content: bytes | None
) -> None:
    key, bucket = "prose/00001.bin", Bucket(environ)
    bucket.delete(key)
    if content is not None:
        bucket.put(key, content)
    reason = "DataMissing" if content is None else "DataCorrupt"

    link = trained(a_remote_config(tmp_path), environ, **{reason: lambda: bucket.upload(corpus)})

    assert link.said == [reason, "-"]
    assert link.losses == undisturbed


def test_a_bucket_of_data_that_is_created_later_is_waited_for(tmp_path: Path, corpus: Path) -> None:
    with moto() as environ:
        bucket = Bucket(environ)

        def create() -> None:
            bucket.create()
            bucket.upload(corpus)

        link = trained(a_remote_config(tmp_path), environ, BucketMissing=create)

    assert link.said == ["BucketMissing", "-"]
    assert f"s3://{CORPUS}/prose" in link.reports[0].message
    assert "create the bucket" in link.reports[0].message


def test_a_bucket_of_checkpoints_that_is_created_later_is_waited_for(
    environ: dict[str, str], tmp_path: Path, corpus: Path, undisturbed: list[float]
) -> None:
    config = a_config(corpus, checkpoint=in_s3(environ, "later"))

    link = trained(config, environ, BucketMissing=Bucket(environ, "later").create)

    assert link.said == ["BucketMissing", "-"]
    assert link.reports[0].message.startswith("s3://later/run: ")
    assert link.losses == undisturbed
    assert isinstance(link.reports[-1], reports.Finished)


@pytest.mark.parametrize("change", ["vocabulary", "context", "tokeniser", "cache", "uri"])
def test_bad_input_in_the_job_itself_ends_it(
    environ: dict[str, str], tmp_path: Path, corpus: Path, change: str
) -> None:
    config = a_remote_config(tmp_path)
    model = json.loads(config.training.model.to_json())
    if change == "vocabulary":
        config = a_remote_config(tmp_path, {"model": model | {"vocabulary": 60}})
    elif change == "context":
        config = a_remote_config(tmp_path, {"model": model | {"context": 5000}})
    elif change == "tokeniser":
        Bucket(environ).put("tokenizer.json", b"{ }")
    elif change == "cache":
        config = a_remote_config(tmp_path, cache={"path": str(tmp_path), "bytes": 5999})
    else:
        sources = [{"name": "web", "uri": "s3://NoBucket/web"}]
        config = a_remote_config(tmp_path, {"data": {"tokenizer": "s3://corpus/tokenizer.json", "sources": sources}})

    try:
        with pytest.raises(InvalidInput):
            trained(config, environ)
    finally:
        dist.destroy_process_group()  # a process that ends by an error leaves it
