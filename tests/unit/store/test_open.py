"""Opening and probing a job's storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain_api.spec.job import S3Storage, Storage
from pretrain_store.directory import DirectoryStore
from pretrain_store.errors import ConditionalPutUnsupported, NoSuchBucket, StoreRefused
from pretrain_store.open import S3Service, check_reachable, is_remote, open_store, probe, split_uri
from support.store.values import MemoryStore


def test_a_path_is_opened_as_a_folder_and_nothing_is_written(tmp_path: Path) -> None:
    store = open_store(Storage(path=str(tmp_path / "new")), {})

    assert isinstance(store, DirectoryStore)
    assert list(tmp_path.iterdir()) == []


def test_s3_takes_endpoint_and_credentials_from_the_environment_given() -> None:
    environ = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_SESSION_TOKEN": "token",
    }

    client = open_store(Storage(s3=S3Storage(bucket="runs")), environ)._client  # type: ignore[attr-defined]
    credentials = client._request_signer._credentials

    assert client.meta.endpoint_url == "http://127.0.0.1:9"
    assert (credentials.access_key, credentials.secret_key, credentials.token) == ("id", "secret", "token")


def test_the_storage_names_the_endpoint_before_the_environment_does() -> None:
    storage = Storage(s3=S3Storage(bucket="runs", endpoint="http://127.0.0.1:8"))

    store = open_store(storage, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})

    assert store._client.meta.endpoint_url == "http://127.0.0.1:8"  # type: ignore[attr-defined]


def test_half_of_the_credentials_is_refused() -> None:
    with pytest.raises(StoreRefused, match="only one is set: set the other"):
        open_store(Storage(s3=S3Storage(bucket="runs")), {"AWS_ACCESS_KEY_ID": "id"})


class IgnoresConditions(MemoryStore):
    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        super().put(key, data)


class ReadOnly(MemoryStore):
    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        raise StoreRefused("Access Denied")


def test_a_store_that_ignores_conditions_is_refused_and_left_clean() -> None:
    store = IgnoresConditions()

    with pytest.raises(ConditionalPutUnsupported, match=r"checkpoint\.storage memory does not honour conditional puts"):
        probe(store)
    assert store.objects == {}


def test_a_store_without_write_permission_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        StoreRefused, match=r"storage cannot be used: Access Denied; allow reading, writing and deleting"
    ):
        probe(ReadOnly())


ENVIRON = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}


@pytest.mark.parametrize(
    ("storage", "endpoint"),
    [
        (Storage(path="/somewhere"), "http://127.0.0.1:9"),
        (Storage(s3=S3Storage(bucket="runs")), "http://127.0.0.1:9"),
        (Storage(s3=S3Storage(bucket="runs", endpoint="http://127.0.0.1:8")), "http://127.0.0.1:8"),
    ],
)
def test_sources_come_from_where_the_checkpoints_go_or_from_where_the_environment_says(
    storage: Storage, endpoint: str
) -> None:
    folder = S3Service(storage, ENVIRON).folder("s3://corpus/some/web/")

    assert folder.describe() == "s3://corpus/some/web"
    assert folder._client.meta.endpoint_url == endpoint  # type: ignore[attr-defined]


def test_one_client_serves_all_folders_of_a_service() -> None:
    service = S3Service(Storage(path="/somewhere"), ENVIRON)

    web, root = service.folder("s3://corpus/web"), service.folder("s3://other")

    assert web._client is root._client  # type: ignore[attr-defined]
    assert root.describe() == "s3://other"


@pytest.mark.parametrize("uri", ["s3://", "s3://Upper/web", "s3://corpus//web//x"])
def test_a_uri_without_a_bucket_or_folder_that_s3_knows_is_refused(uri: str) -> None:
    with pytest.raises(StoreRefused, match=f"{uri} is not s3://BUCKET/PREFIX"):
        S3Service(Storage(path="/somewhere"), ENVIRON).folder(uri)


def test_a_look_at_a_folder_is_always_fine(tmp_path: Path) -> None:
    check_reachable(Storage(path=str(tmp_path / "new")), {})

    assert list(tmp_path.iterdir()) == []


def test_only_s3_is_remote() -> None:
    assert is_remote("s3://corpus/web")
    assert not is_remote("/corpus/s3://web")
    assert split_uri("s3://corpus/web/tokenizer.json") == ("s3://corpus/web", "tokenizer.json")


class Absent(MemoryStore):
    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        raise NoSuchBucket("no such bucket")


def test_a_probe_of_a_bucket_that_is_missing_says_so() -> None:
    with pytest.raises(NoSuchBucket, match="storage cannot be used: no such bucket; create the bucket, or choose"):
        probe(Absent())
