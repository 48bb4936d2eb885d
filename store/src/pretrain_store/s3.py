"""An S3 bucket as an object store, through boto3.

Conditional puts are `If-None-Match: *`. botocore retries transient errors by itself (standard mode), so that a put
whose answer was lost meets its own object and raises ObjectExists: the caller tells its own object from another's.
"""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import functools
import hashlib
import random
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from botocore.exceptions import HTTPClientError, IncompleteReadError

from pretrain_api.backoff import Backoff
from pretrain_api.checkpoint.lineage import StoredObject
from pretrain_api.spec.job import S3Storage
from pretrain_store.digest import Digest
from pretrain_store.errors import ObjectNotFound, StoreUnavailable
from pretrain_store.port import FULL_RETRIES, MultipartUpload, ObjectInfo, RetryLimits
from pretrain_store.s3_client import make_client, transfer_config
from pretrain_store.s3_errors import S3_ERRORS, PutConflict, translate

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import ListMultipartUploadsOutputTypeDef, ListObjectsV2OutputTypeDef

_PART = 16 << 20
_MOST_PARTS = 9_000
"""S3 takes 10,000."""
_READERS = 4
"""Parts of one object received at once; several objects are received at once, too."""
_READ = 1 << 20
"""Bytes a read: with 256 KiB receiving takes a fifth more CPU."""
_PART_ATTEMPTS = 5
"""Attempts for each part, whose connection may break after the headers, where botocore does not retry."""
_PART_BACKOFF = Backoff(first=0.4, factor=2, most=3.2, jitter=0.5)
"""At least 3 s in all: one part that fails makes all ranks fetch everything again."""
_CONFLICT_ATTEMPTS = 8
_CONFLICT_BACKOFF = Backoff(first=0.2, factor=2, most=6.4, jitter=1)
"""12.7 s in all on average."""


def open_s3(storage: S3Storage, environ: Mapping[str, str], limits: RetryLimits = FULL_RETRIES) -> S3Store:
    """Open the store of `storage`, with the credentials of `environ` or of boto3's chain. Sends nothing."""
    client = make_client(storage, environ, limits)
    return S3Store(client, storage.bucket, storage.prefix, time.sleep, random.random)


def preload() -> None:
    """Read the files that the first client of a process reads (0.1 s), for a process whose forks make clients."""
    open_s3(S3Storage(bucket="preload"), {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"})


class S3Store:
    """An ObjectStore below a prefix of a bucket."""

    def __init__(
        self,
        client: S3Client,
        bucket: str,
        prefix: str,
        sleep: Callable[[float], None],
        random: Callable[[], float],
    ) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._sleep = sleep
        self._random = random

    def at(self, place: S3Storage) -> S3Store:
        """Return the store at another place of the same service, with the same client."""
        return S3Store(self._client, place.bucket, place.prefix, self._sleep, self._random)

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """See ObjectStore. Raises ConditionalPutUnsupported when the service has no conditional puts."""
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if if_absent else {}
        for attempt in range(1, _CONFLICT_ATTEMPTS + 1):
            try:
                with self._translated(key):
                    self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=data, **condition)
                return
            except PutConflict:
                if attempt < _CONFLICT_ATTEMPTS:
                    self._sleep(_CONFLICT_BACKOFF.delay(attempt, self._random))
        raise StoreUnavailable(f"{self.describe()}: {key}: conditional puts of others are under way all the time")

    def put_file(self, key: str, path: Path) -> StoredObject:
        """See ObjectStore."""
        with path.open("rb") as file, self._translated(key):
            part = max(_PART, -(-path.stat().st_size // _MOST_PARTS))
            stream = _DigestedStream(file)
            self._client.upload_fileobj(
                cast("BinaryIO", stream), self._bucket, self._prefix + key, Config=transfer_config(part)
            )
        return StoredObject(key=key, size=stream.size, sha256=stream.digest.hexdigest())

    def get(self, key: str) -> bytes:
        """See ObjectStore."""
        with self._translated(key):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
            return cast("bytes", cast("Any", answer["Body"]).read())

    def fetch(self, key: str, path: Path) -> None:
        """See ObjectStore."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            with self._translated(key):
                self._client.download_file(
                    self._bucket, self._prefix + key, str(partial), Config=transfer_config(_PART)
                )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def receive(self, key: str, into: memoryview) -> Digest:
        """See ObjectStore. Parts are received in place at once, and digested in order."""
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
        for attempt in range(1, _PART_ATTEMPTS + 1):
            wanted = f"bytes={start + done}-{start + len(part) - 1}"
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, Range=wanted)
            with closing(cast("Any", answer["Body"])) as body:
                try:
                    while done < len(part):
                        count = body.readinto(part[done : done + _READ])
                        if not count:
                            raise IncompleteReadError(actual_bytes=done, expected_bytes=len(part))
                        done += count
                except (HTTPClientError, IncompleteReadError):
                    if attempt == _PART_ATTEMPTS:
                        raise
                    self._sleep(_PART_BACKOFF.delay(attempt, self._random))
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
            pages = cast(
                "Iterable[ListObjectsV2OutputTypeDef]",  # botocore's page iterator has no types
                self._client.get_paginator("list_objects_v2").paginate(
                    Bucket=self._bucket, Prefix=self._prefix + prefix
                ),
            )
            found = [(item.get("Key", ""), item.get("Size", 0)) for page in pages for item in page.get("Contents", ())]
        return tuple(ObjectInfo(key.removeprefix(self._prefix), size) for key, size in found)

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        try:
            with self._translated(key):
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)
        except ObjectNotFound:
            return

    def list_uploads(self, prefix: str) -> tuple[MultipartUpload, ...]:
        """See ObjectStore."""
        with self._translated(prefix):
            pages = cast(
                "Iterable[ListMultipartUploadsOutputTypeDef]",
                self._client.get_paginator("list_multipart_uploads").paginate(
                    Bucket=self._bucket, Prefix=self._prefix + prefix
                ),
            )
            found = [
                (item.get("Key", ""), item.get("UploadId", "")) for page in pages for item in page.get("Uploads", ())
            ]
        return tuple(MultipartUpload(key.removeprefix(self._prefix), upload) for key, upload in found)

    def abort(self, upload: MultipartUpload) -> None:
        """See ObjectStore."""
        try:
            with self._translated(upload.key):
                self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=self._prefix + upload.key, UploadId=upload.upload
                )
        except ObjectNotFound:
            return

    def describe(self) -> str:
        """See ObjectStore."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @contextmanager
    def _translated(self, key: str) -> Generator[None]:
        try:
            yield
        except S3_ERRORS as error:
            raise translate(error, key, self.describe()) from error


class _DigestedStream:
    """A stream whose bytes are counted and digested as they are read; it cannot seek, so each is read once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        data = self._file.read(size)
        self.digest.update(data)
        self.size += len(data)
        return data
