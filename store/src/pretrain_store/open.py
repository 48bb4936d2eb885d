"""Opening a job's storage, and probing that it works."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from pretrain_api.checkpoint.lineage import IDENTITY_KEY
from pretrain_api.spec.job import S3Storage, Storage
from pretrain_store.directory import DirectoryStore
from pretrain_store.errors import ConditionalPutUnsupported, NoSuchBucket, ObjectExists, ObjectNotFound, StoreRefused
from pretrain_store.port import FEW_RETRIES, FULL_RETRIES, ObjectReader, ObjectStore, RetryLimits

if TYPE_CHECKING:
    from pretrain_store.s3 import S3Store

_S3 = "s3://"


def open_store(storage: Storage, environ: Mapping[str, str], limits: RetryLimits = FULL_RETRIES) -> ObjectStore:
    """Open the store of a job, whose `storage.path` is absolute by now. Sends nothing: see `probe`.

    S3 takes credentials from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN in `environ`, else from
    boto3's chain; its endpoint from the storage, else from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, else AWS.
    """
    if storage.s3 is not None:
        from pretrain_store.s3 import open_s3  # importing boto3 takes 0.3 s

        return open_s3(storage.s3, environ, limits)
    assert storage.path is not None
    store = DirectoryStore(Path(storage.path))
    store.clear_litter()
    return store


def link_folder(storage: Storage) -> Path | None:
    """Return a folder into which the store's objects are fetched as hard links; None: fetched files are copies."""
    return DirectoryStore(Path(storage.path)).scratch if storage.path is not None else None


def check_reachable(storage: Storage, environ: Mapping[str, str]) -> None:
    """Check within seconds that a service answers and can be read; folders always do.

    Raises StoreRefused (NoSuchBucket, CredentialsRejected) or StoreUnavailable.
    """
    if storage.s3 is not None:
        with suppress(ObjectNotFound):
            open_store(storage, environ, FEW_RETRIES).get(IDENTITY_KEY)


def is_remote(uri: str) -> bool:
    """Return whether the URI is in S3, not in a folder."""
    return uri.startswith(_S3)


class S3Service:
    """The S3 service of a job's sources: that of its checkpoints if these are in S3, else the one in `environ`.

    Sends nothing yet; one client serves all folders.
    """

    def __init__(self, storage: Storage, environ: Mapping[str, str], limits: RetryLimits = FULL_RETRIES) -> None:
        self._endpoint = storage.s3.endpoint if storage.s3 else ""
        self._region = storage.s3.region if storage.s3 else environ.get("AWS_REGION") or "us-east-1"
        self._environ = environ
        self._limits = limits
        self._opened: S3Store | None = None

    def folder(self, uri: str) -> ObjectReader:
        """Return the objects below an s3:// URI. Raises StoreRefused for an invalid URI or half of the credentials."""
        from pretrain_store.s3 import open_s3

        bucket, _, prefix = uri.removeprefix(_S3).partition("/")
        try:
            place = S3Storage(bucket=bucket, prefix=prefix.strip("/"), endpoint=self._endpoint, region=self._region)
        except ValidationError as error:
            said = error.errors()[0]["msg"]
            raise StoreRefused(
                f"{uri} is not s3://BUCKET/PREFIX with names that S3 knows ({said}): correct it"
            ) from error
        if self._opened is None:
            self._opened = open_s3(place, self._environ, self._limits)
        return self._opened.at(place)


def split_uri(uri: str) -> tuple[str, str]:
    """Split an object's URI into the folder and the name in it."""
    folder, _, name = uri.rpartition("/")
    return folder, name


def probe(store: ObjectStore) -> None:
    """Prove that objects can be put, read and deleted, and that conditional puts are honoured; leaves nothing behind.

    Raises StoreRefused (or one of its kinds) or ConditionalPutUnsupported, with one sentence that names the storage and
    the remedy.
    """
    key = f"probe/{uuid.uuid4().hex}"
    data = key.encode()
    try:
        _prove(store, key, data)
        store.delete(key)
    except StoreRefused as error:
        remedy = "create the bucket" if isinstance(error, NoSuchBucket) else "allow reading, writing and deleting there"
        raise type(error)(f"checkpoint.storage cannot be used: {error}; {remedy}, or choose another one") from error


def _prove(store: ObjectStore, key: str, data: bytes) -> None:
    with suppress(ObjectExists):  # the key is unique: the object is our own, its answer was lost
        store.put(key, data, if_absent=True)
    try:
        store.put(key, b"", if_absent=True)
    except ObjectExists:
        pass
    else:
        store.delete(key)
        raise _unsupported(store)
    try:
        kept = store.get(key)
    except ObjectNotFound:
        kept = None
    if kept != data:
        store.delete(key)
        raise _unsupported(store)


def _unsupported(store: ObjectStore) -> ConditionalPutUnsupported:
    return ConditionalPutUnsupported(
        f"checkpoint.storage {store.describe()} does not honour conditional puts (If-None-Match): "
        "two generations could both write the history; choose a store that does"
    )
