"""The contract of an ObjectStore against a real S3 server (versitygw)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain_api.spec.job import S3Storage, Storage
from pretrain_store.errors import CredentialsRejected, NoSuchBucket, ObjectNotFound, StoreUnavailable
from pretrain_store.open import S3Service, check_reachable, open_store, probe
from pretrain_store.port import FEW_RETRIES, ObjectStore
from support.store.contract import LARGE, StoreContract
from support.store.s3 import Server, s3_server

PREFIXES = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("s3")
    (data / "runs").mkdir()
    with s3_server(data) as server:
        yield server


@pytest.fixture
def store(server: Server) -> ObjectStore:
    storage = Storage(s3=S3Storage(bucket="runs", prefix=f"some/prefix-{next(PREFIXES)}"))
    return open_store(storage, server.environ())


class TestRealS3(StoreContract):
    pass


@pytest.mark.parametrize(("size", "operation"), [(10, "PutObject"), (LARGE, "UploadPart")])
def test_what_changes_on_the_way_without_tls_is_refused(
    store: ObjectStore, size: int, operation: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(size))
    sent: list[Any] = []

    def tamper(request: Any, **_: object) -> None:
        sent.append(request)
        request.body = b"\x01" * int(request.headers["Content-Length"])

    client: Any = store._client  # type: ignore[attr-defined]
    client.meta.events.register(f"before-send.s3.{operation}", tamper)
    with pytest.raises(StoreUnavailable, match=r"SHA256|Digest"):
        store.put_file("key", tmp_path / "file")

    assert all("x-amz-checksum-crc32" not in request.headers for request in sent), "its sha256 is signed"
    assert store.list("") == ()


def in_bucket(bucket: str) -> Storage:
    return Storage(s3=S3Storage(bucket=bucket, prefix="job"))


def test_a_wrong_secret_is_refused_with_the_storage_named(server: Server) -> None:
    storage, environ = in_bucket("runs"), server.environ(secret="wrong")

    with pytest.raises(CredentialsRejected, match=r"checkpoint\.storage cannot be used: s3://runs/job"):
        probe(open_store(storage, environ))
    with pytest.raises(CredentialsRejected, match="s3://runs/job"):
        check_reachable(storage, environ)


def test_a_bucket_that_is_not_there_is_refused(server: Server) -> None:
    storage, environ = in_bucket("absent"), server.environ()

    with pytest.raises(NoSuchBucket, match=r"checkpoint\.storage cannot be used: s3://absent/job"):
        probe(open_store(storage, environ))
    with pytest.raises(NoSuchBucket, match="s3://absent/job"):
        check_reachable(storage, environ)


def test_a_bucket_that_is_there_and_empty_is_found_by_a_look(server: Server) -> None:
    check_reachable(in_bucket("runs"), server.environ())


def test_a_server_that_is_gone_is_found_out_by_a_look(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with s3_server(tmp_path) as server:
        server.stop()

        with pytest.raises(StoreUnavailable, match="Could not connect"):
            check_reachable(in_bucket("runs"), server.environ())


def test_sources_are_read_from_the_service_of_the_checkpoints(server: Server, tmp_path: Path) -> None:
    (server.data / "corpus" / "web").mkdir(parents=True)
    (server.data / "corpus" / "web" / "00000.bin").write_bytes(b"tokens")
    storage = Storage(s3=S3Storage(bucket="runs", endpoint=server.url))
    environ = {name: value for name, value in server.environ().items() if name != "AWS_ENDPOINT_URL"}

    folder = S3Service(storage, environ, FEW_RETRIES).folder("s3://corpus/web/")
    folder.fetch("00000.bin", tmp_path / "shard")
    version = folder.version("00000.bin")
    (server.data / "corpus" / "web" / "00000.bin").unlink()
    open_store(Storage(s3=S3Storage(bucket="corpus", prefix="web")), server.environ()).put("00000.bin", b"others")

    assert (tmp_path / "shard").read_bytes() == b"tokens"
    assert [(item.key, item.size) for item in folder.list("")] == [("00000.bin", 6)]
    assert folder.version("00000.bin") != version
    with pytest.raises(ObjectNotFound):
        folder.version("00001.bin")
