"""The S3 adapter against moto's server, and against a client that fails in chosen ways."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import (
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from moto.server import ThreadedMotoServer

from pretrain_api.checkpoint.lineage import checkpoint_folder
from pretrain_api.spec.job import S3Storage, Storage
from pretrain_store.errors import (
    ConditionalPutUnsupported,
    CredentialsRejected,
    NoSuchBucket,
    ObjectExists,
    ObjectNotFound,
    StoreError,
    StoreRefused,
    StoreUnavailable,
)
from pretrain_store.history import put_record, sweep
from pretrain_store.open import open_store, probe
from pretrain_store.port import MultipartUpload, ObjectStore
from pretrain_store.s3 import S3Store
from support.store.contract import StoreContract, keys
from support.store.values import a_record

PREFIXES = itertools.count()


@pytest.fixture(scope="module")
def environ() -> Iterator[dict[str, str]]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environ = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }
    try:
        import boto3

        client: Any = boto3.client(
            "s3",
            endpoint_url=environ["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        client.create_bucket(Bucket="runs")
        yield environ
    finally:
        server.stop()


def in_bucket(environ: dict[str, str], prefix: str, bucket: str = "runs") -> ObjectStore:
    return open_store(Storage(s3=S3Storage(bucket=bucket, prefix=prefix)), environ)


@pytest.fixture
def store(environ: dict[str, str]) -> ObjectStore:
    return in_bucket(environ, f"some/prefix-{next(PREFIXES)}")


class TestS3(StoreContract):
    pass


def test_prefixes_do_not_see_each_other(environ: dict[str, str]) -> None:
    store, longer, whole = in_bucket(environ, "job"), in_bucket(environ, "job-2"), in_bucket(environ, "")
    store.put("key", b"1")
    longer.put("key", b"2")

    assert keys(store) == keys(longer) == ["key"]
    assert store.get("key") == b"1"
    assert {"job/key", "job-2/key"} <= set(keys(whole))
    assert (store.describe(), whole.describe()) == ("s3://runs/job", "s3://runs")


def test_a_bucket_that_is_not_there_is_refused_by_name(environ: dict[str, str]) -> None:
    with pytest.raises(NoSuchBucket, match=r"checkpoint\.storage cannot be used: s3://absent/job: .*create the bucket"):
        probe(in_bucket(environ, "job", bucket="absent"))


class FailingClient:
    """An S3 client whose puts fail in turn with these errors, then succeed; None: it happened, nothing is raised."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors = list(errors)
        self.puts = 0

    def put_object(self, **arguments: object) -> dict[str, Any]:
        self.puts += 1
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        return {}


def answered(status: int, code: str) -> ClientError:
    response: Any = {"Error": {"Code": code, "Message": "why"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, "PutObject")


def failing(*errors: Exception | None) -> tuple[S3Store, FailingClient, list[float]]:
    client: Any = FailingClient(*errors)
    slept: list[float] = []
    return S3Store(client, "runs", "job", slept.append, lambda: 0.0), client, slept


def test_a_conflict_of_conditional_puts_is_tried_again_until_it_is_decided() -> None:
    conflict = answered(409, "ConditionalRequestConflict")
    store, client, slept = failing(conflict, conflict)
    store.put("key", b"", if_absent=True)
    assert (client.puts, len(slept)) == (3, 2)

    lost, _, _ = failing(conflict, answered(412, "PreconditionFailed"))
    with pytest.raises(ObjectExists):
        lost.put("key", b"", if_absent=True)

    for_ever, _, slept = failing(*[conflict] * 100)
    with pytest.raises(StoreUnavailable, match="under way"):
        for_ever.put("key", b"", if_absent=True)
    assert sum(slept) < 30
    assert slept == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 6.4])


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (answered(403, "AccessDenied"), CredentialsRejected),
        (answered(403, "InvalidAccessKeyId"), CredentialsRejected),
        (answered(400, "ExpiredToken"), CredentialsRejected),
        (answered(400, "InvalidArgument"), StoreRefused),
        (answered(404, "NoSuchBucket"), NoSuchBucket),
        (answered(301, "PermanentRedirect"), StoreRefused),
        (NoCredentialsError(), CredentialsRejected),
        (answered(404, "NoSuchKey"), ObjectNotFound),
        (answered(501, "NotImplemented"), ConditionalPutUnsupported),
        (answered(500, "InternalError"), StoreUnavailable),
        (answered(503, "SlowDown"), StoreUnavailable),
        (answered(400, "BadDigest"), StoreUnavailable),
        (EndpointConnectionError(endpoint_url="http://127.0.0.1:1"), StoreUnavailable),
    ],
)
def test_an_error_says_what_to_do(error: Exception, meaning: type[StoreError]) -> None:
    store, _, _ = failing(error)

    with pytest.raises(StoreError) as raised:
        store.put("key", b"")

    assert type(raised.value) is meaning


class Breaks:
    """A body that breaks off after `after` bytes, without an error if it ends early; None: it does not."""

    def __init__(self, data: bytes, after: int | None, error: Exception | None) -> None:
        self._left = memoryview(data)[:after]
        self._error = error if after is not None else None
        self.closed = False

    def readinto(self, into: memoryview) -> int:
        count = min(len(into), len(self._left), 3)
        if not count and self._error is not None:
            raise self._error
        into[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        self.closed = True


class BreakingClient:
    """A client of one object, whose first bodies break off after 4 bytes each."""

    def __init__(self, data: bytes, times: int, error: Exception | None) -> None:
        self._data, self._times, self._error = data, times, error
        self.asked: list[str] = []
        self.bodies: list[Breaks] = []

    def head_object(self, **arguments: object) -> dict[str, Any]:
        return {"ContentLength": len(self._data)}

    def get_object(self, *, Range: str, **arguments: object) -> dict[str, Any]:
        first, last = (int(place) for place in Range.removeprefix("bytes=").split("-"))
        broken = len(self.asked) < self._times
        self.asked.append(Range)
        self.bodies.append(Breaks(self._data[first : last + 1], 4 if broken else None, self._error))
        return {"Body": self.bodies[-1]}


@pytest.mark.parametrize(
    "error", [ReadTimeoutError(endpoint_url="http://s3"), ResponseStreamingError(error="reset"), None]
)
def test_a_broken_download_resumes_where_it_broke(error: Exception | None) -> None:
    data, memory, slept = b"0123456789", bytearray(10), list[float]()
    client: Any = BreakingClient(data, 2, error)

    found = S3Store(client, "runs", "job", slept.append, lambda: 0.0).receive("key", memoryview(memory))

    assert memory == data
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert client.asked == ["bytes=0-9", "bytes=4-9", "bytes=8-9"]
    assert all(body.closed for body in client.bodies)
    assert len(slept) == 2


def test_what_breaks_off_all_the_time_is_unavailable() -> None:
    client: Any = BreakingClient(bytes(100), 100, ReadTimeoutError(endpoint_url="http://s3"))
    slept: list[float] = []

    with pytest.raises(StoreUnavailable):
        S3Store(client, "runs", "job", slept.append, lambda: 0.0).receive("key", memoryview(bytearray(100)))

    assert len(client.asked) == len(slept) + 1 < 10


@pytest.mark.parametrize(("endpoint", "when"), [
    ("http://s3", "when_required"), ("https://s3", "when_supported"), ("", "when_supported"),
])  # fmt: skip
def test_a_checksum_is_sent_where_no_signature_covers_the_bytes(endpoint: str, when: str) -> None:
    storage = Storage(s3=S3Storage(bucket="runs", endpoint=endpoint))
    store: Any = open_store(storage, {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"})

    assert store._client.meta.config.request_checksum_calculation == when


def test_a_sweep_aborts_uploads_of_earlier_generations_and_leaves_those_that_may_be_under_way(
    environ: dict[str, str],
) -> None:
    import boto3

    store = in_bucket(environ, "swept")
    client: Any = boto3.client(
        "s3",
        endpoint_url=environ["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    for generation in (1, 2, 3):
        put_record(store, a_record(generation))
    begun = [f"{checkpoint_folder(generation, 10)}/__0_0.distcp" for generation in (1, 2, 3)]
    for key in begun:
        upload = client.create_multipart_upload(Bucket="runs", Key=f"swept/{key}")["UploadId"]
        client.upload_part(Bucket="runs", Key=f"swept/{key}", UploadId=upload, PartNumber=1, Body=b"part")

    assert sweep(store, 2) == (), "a later record is there: nothing is touched"
    assert [item.key for item in store.list_uploads("checkpoints/")] == begun
    sweep(store, 3)
    assert [item.key for item in store.list_uploads("checkpoints/")] == begun[2:]
    store.abort(MultipartUpload(begun[0], "gone"))
