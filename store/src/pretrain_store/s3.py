"""An S3 bucket as an object store, through boto3.

Conditional puts are `If-None-Match: *`. botocore retries by itself what is worth it (standard mode), so that a put
whose answer was lost meets its own object and raises Exists: telling one's own from another's is the caller's business.
"""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import functools
import hashlib
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError, NoCredentialsError
from botocore.exceptions import ConnectionError as NoConnection
from botocore.loaders import Loader
from botocore.session import Session as CoreSession

from pretrain_api.checkpoint.lineage import StoredObject
from pretrain_api.spec.job import S3Storage
from pretrain_store.digest import Digest
from pretrain_store.errors import (
    AccessDenied,
    BucketMissing,
    Exists,
    Missing,
    Refused,
    StoreError,
    Unavailable,
    Unsupported,
)
from pretrain_store.port import ENDURING, ObjectInfo, Patience, Unfinished

_PART = 16 << 20
_MOST_PARTS = 9_000
"""S3 takes 10,000."""
_THREADS = 8
_READERS = 4
"""Parts of one object that are received at once: several objects are."""
_READ = 1 << 20
"""Bytes a read: with 256 KiB receiving takes a fifth more CPU."""
_TRIES = 5
"""For each part, whose connection may break after the headers came, which botocore does not try again."""
_TRY_SECONDS = 0.1
_CONFLICTS = 8
_CONFLICT_SECONDS = 0.05
_MISSING = frozenset({"NoSuchKey", "NoSuchUpload", "404", "NotFound"})
_REFUSED_STATUS = frozenset({301, 307, 400, 401, 403, 404, 405})
_DENIED_STATUS = frozenset({401, 403})
_DENIED = frozenset({"ExpiredToken", "InvalidToken", "AuthorizationHeaderMalformed"})
"""Of the errors with a status of 400: about credentials."""
_TRANSIENT = frozenset(
    {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
)
"""Of the errors with a status of 400: broken on the way."""


class _Paginator(Protocol):
    def paginate(self, **arguments: object) -> Iterator[dict[str, Any]]: ...


class S3Client(Protocol):
    """What is used of boto3's client."""

    def put_object(self, **arguments: object) -> dict[str, Any]:
        """PutObject."""
        ...

    def get_object(self, **arguments: object) -> dict[str, Any]:
        """GetObject."""
        ...

    def head_object(self, **arguments: object) -> dict[str, Any]:
        """HeadObject."""
        ...

    def delete_object(self, **arguments: object) -> dict[str, Any]:
        """DeleteObject."""
        ...

    def abort_multipart_upload(self, **arguments: object) -> dict[str, Any]:
        """AbortMultipartUpload."""
        ...

    def upload_fileobj(self, fileobj: object, bucket: str, key: str, **arguments: object) -> None:
        """Upload a stream, in parts when it is large."""
        ...

    def download_file(self, bucket: str, key: str, filename: str, **arguments: object) -> None:
        """Download to a file by parallel ranged reads."""
        ...

    def get_paginator(self, operation: str) -> _Paginator:
        """All pages of a listing."""
        ...


def open_s3(storage: S3Storage, environ: Mapping[str, str], patience: Patience = ENDURING) -> S3Store:
    """The store of `storage`, with the credentials of `environ` or of boto3's chain. Sends nothing."""
    endpoint = storage.endpoint or environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or None
    config = Config(
        retries={"mode": "standard", "total_max_attempts": patience.attempts},
        connect_timeout=patience.connect_seconds,
        read_timeout=patience.read_seconds,
        max_pool_connections=2 * _THREADS,
        # Servers other than AWS are seldom reached by a host name for each bucket.
        s3={"addressing_style": "path" if endpoint else "auto"},
        # Without TLS each request is signed with the sha256 of its body: a CRC32 beside that is work and finds no more.
        request_checksum_calculation="when_required" if (endpoint or "").startswith("http://") else "when_supported",
    )
    access, secret = environ.get("AWS_ACCESS_KEY_ID"), environ.get("AWS_SECRET_ACCESS_KEY")
    if bool(access) != bool(secret):
        raise Refused("S3 needs both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and only one is set: set the other")
    try:
        core: Any = CoreSession()
        core.register_component("data_loader", _service_models())
        session: Any = Session(
            botocore_session=core,
            aws_access_key_id=access or None,
            aws_secret_access_key=secret or None,
            aws_session_token=environ.get("AWS_SESSION_TOKEN") or None,
            region_name=storage.region,
        )
        client = session.client("s3", endpoint_url=endpoint, config=config)
    except (BotoCoreError, ValueError) as error:
        raise Refused(f"S3 cannot be used: {error}") from error
    return S3Store(cast("S3Client", client), storage.bucket, storage.prefix, time.sleep)


def preload() -> None:
    """Read what the first client of a process reads (0.1 s), for a process whose forks will have clients."""
    open_s3(S3Storage(bucket="preload"), {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"})


@functools.cache
def _service_models() -> Any:
    """What botocore knows of services: its own sessions would read it again, each for itself."""
    return Loader()


class S3Store:
    """An ObjectStore below a prefix of a bucket."""

    def __init__(self, client: S3Client, bucket: str, prefix: str, sleep: Callable[[float], None]) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._sleep = sleep

    def at(self, place: S3Storage) -> S3Store:
        """Another place at the same service, through the same client."""
        return S3Store(self._client, place.bucket, place.prefix, self._sleep)

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """See ObjectStore. Raises Unsupported when the service knows no conditional puts."""
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        for attempt in range(_CONFLICTS):
            try:
                with self._translated(key):
                    self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=data, **condition)
                return
            except _Conflict:  # another conditional put of this key is under way: who wins is not decided yet
                self._sleep(_CONFLICT_SECONDS * 2**attempt)
        raise Unavailable(f"{self.describe()}: {key}: conditional puts of others are under way all the time")

    def put_file(self, key: str, path: Path) -> StoredObject:
        """See ObjectStore."""
        with path.open("rb") as file, self._translated(key):
            part = max(_PART, -(-path.stat().st_size // _MOST_PARTS))
            stream = _Hashed(file)
            self._client.upload_fileobj(stream, self._bucket, self._prefix + key, Config=_transfer(part))
        return StoredObject(key=key, size=stream.size, sha256=stream.digest.hexdigest())

    def get(self, key: str) -> bytes:
        """See ObjectStore."""
        with self._translated(key):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
            return cast("bytes", answer["Body"].read())

    def fetch(self, key: str, path: Path) -> None:
        """See ObjectStore."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            with self._translated(key):
                self._client.download_file(self._bucket, self._prefix + key, str(partial), Config=_transfer(_PART))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def receive(self, key: str, into: memoryview) -> Digest:
        """See ObjectStore. Parts come to where they belong at once, and are digested in order."""
        digest = hashlib.sha256()
        with self._translated(key):
            size = int(self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)["ContentLength"])
            if size == len(into):
                starts = range(0, size, _PART)
                with ThreadPoolExecutor(min(_READERS, max(1, len(starts)))) as threads:
                    for part in threads.map(functools.partial(self._receive_part, key, into), starts):
                        digest.update(part)
        return Digest(size, digest.hexdigest())

    def _receive_part(self, key: str, into: memoryview, start: int) -> memoryview:
        part = into[start : start + _PART]
        done = 0
        for attempt in range(1, _TRIES + 1):
            asked = f"bytes={start + done}-{start + len(part) - 1}"
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, Range=asked)
            with closing(answer["Body"]) as body:
                try:
                    while done < len(part):
                        count = body.readinto(part[done : done + _READ])
                        if not count:
                            raise IncompleteReadError(actual_bytes=done, expected_bytes=len(part))
                        done += count
                except (HTTPClientError, IncompleteReadError):
                    if attempt == _TRIES:
                        raise
                    self._sleep(_TRY_SECONDS * 2**attempt)
                else:
                    break
        return part

    def version(self, key: str) -> str:
        """See ObjectReader."""
        with self._translated(key):
            head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)
        return f"{head.get('ETag')} {head.get('LastModified')} {head.get('ContentLength')}"

    def list(self, prefix: str) -> tuple[ObjectInfo, ...]:
        """See ObjectStore."""
        with self._translated(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            found = [item for page in pages for item in page.get("Contents", ())]
        return tuple(ObjectInfo(item["Key"].removeprefix(self._prefix), item["Size"]) for item in found)

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        try:
            with self._translated(key):
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)
        except Missing:
            return

    def unfinished(self, prefix: str) -> tuple[Unfinished, ...]:
        """See ObjectStore."""
        with self._translated(prefix):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            found = [item for page in pages for item in page.get("Uploads", ())]
        return tuple(Unfinished(item["Key"].removeprefix(self._prefix), item["UploadId"]) for item in found)

    def abort(self, upload: Unfinished) -> None:
        """See ObjectStore."""
        try:
            with self._translated(upload.key):
                self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=self._prefix + upload.key, UploadId=upload.upload
                )
        except Missing:
            return

    def describe(self) -> str:
        """See ObjectStore."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @contextmanager
    def _translated(self, key: str) -> Generator[None]:
        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise _translate(error, key, self.describe()) from error


class _Conflict(StoreError):
    """409: a conditional put met another one that is not decided yet."""


class _Hashed:
    """A stream whose bytes are counted and digested as they are read; it cannot seek, so each is read once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        data = self._file.read(size)
        self.digest.update(data)
        self.size += len(data)
        return data


def _transfer(part: int) -> TransferConfig:
    return TransferConfig(
        multipart_threshold=part,
        multipart_chunksize=part,
        max_concurrency=_THREADS,
        preferred_transfer_client="classic",  # the CRT client fails on endpoints other than AWS
    )


def _translate(error: Exception, key: str, where: str) -> StoreError:
    """The error of this package that says what the caller should do."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ClientError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        if isinstance(error, NoCredentialsError):
            return AccessDenied(f"{where}: {error}")
        transient = isinstance(error, (HTTPClientError, NoConnection, IncompleteReadError, Boto3Error))
        return (Unavailable if transient else Refused)(f"{where}: {error}")
    response = cast("dict[str, Any]", cause.response)
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in _MISSING:
        return Missing(key)
    if code == "PreconditionFailed" or status == 412:
        return Exists(key)
    if code == "ConditionalRequestConflict":
        return _Conflict(key)
    if code == "NotImplemented" or status == 501:
        return Unsupported(f"{where} does not know what was asked of it ({error}): choose another store")
    if code == "NoSuchBucket":
        return BucketMissing(f"{where}: {error}")
    if status in _DENIED_STATUS or code in _DENIED:
        return AccessDenied(f"{where}: {error}")
    if status in _REFUSED_STATUS and code not in _TRANSIENT:
        return Refused(f"{where}: {error}")
    return Unavailable(f"{where}: {error}")
