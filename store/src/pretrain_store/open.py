"""From a job's storage to a store that is known to work."""

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
from pretrain_store.errors import BucketMissing, Exists, Missing, Refused, Unsupported
from pretrain_store.port import ENDURING, LOOKING, ObjectReader, ObjectStore, Patience

if TYPE_CHECKING:
    from pretrain_store.s3 import S3Store

_S3 = "s3://"


def open_store(storage: Storage, environ: Mapping[str, str], patience: Patience = ENDURING) -> ObjectStore:
    """The store of a job; `storage.path` is absolute by now. Nothing is asked of it yet: see `probe`.

    S3 takes credentials from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN in `environ`, else where
    boto3 finds them; its endpoint from the storage, else from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, else AWS.
    """
    if storage.s3 is not None:
        from pretrain_store.s3 import open_s3  # boto3 takes 0.3 s to import: only for whom it serves

        return open_s3(storage.s3, environ, patience)
    assert storage.path is not None
    store = DirectoryStore(Path(storage.path))
    store.clear_litter()
    return store


def links_of(storage: Storage) -> Path | None:
    """A folder where what is fetched from a store in a folder is a link to it; None: fetched files are copies."""
    return DirectoryStore(Path(storage.path)).scratch if storage.path is not None else None


def look(storage: Storage, environ: Mapping[str, str]) -> None:
    """Find out within seconds whether a service is there and lets itself be read; folders always answer at once.

    Raises Refused (BucketMissing, AccessDenied) or Unavailable.
    """
    if storage.s3 is not None:
        with suppress(Missing):
            open_store(storage, environ, LOOKING).get(IDENTITY_KEY)


def is_remote(uri: str) -> bool:
    """Whether the URI names something in S3, not in a folder."""
    return uri.startswith(_S3)


class Service:
    """The S3 service that sources are read from: that of the job's checkpoints if these are in S3, else the one that
    `environ` names. Nothing is asked of it yet; one client serves all folders.
    """

    def __init__(self, storage: Storage, environ: Mapping[str, str], patience: Patience = ENDURING) -> None:
        self._endpoint = storage.s3.endpoint if storage.s3 else ""
        self._region = storage.s3.region if storage.s3 else environ.get("AWS_REGION") or "us-east-1"
        self._environ = environ
        self._patience = patience
        self._opened: S3Store | None = None

    def folder(self, uri: str) -> ObjectReader:
        """The objects below an s3:// URI. Raises Refused for what is no such URI, and for half of the credentials."""
        from pretrain_store.s3 import open_s3

        bucket, _, prefix = uri.removeprefix(_S3).partition("/")
        try:
            place = S3Storage(bucket=bucket, prefix=prefix.strip("/"), endpoint=self._endpoint, region=self._region)
        except ValidationError as error:
            said = error.errors()[0]["msg"]
            raise Refused(f"{uri} is not s3://BUCKET/PREFIX with names that S3 knows ({said}): correct it") from error
        if self._opened is None:
            self._opened = open_s3(place, self._environ, self._patience)
        return self._opened.at(place)


def split_uri(uri: str) -> tuple[str, str]:
    """The folder and the name in it of an object's URI."""
    folder, _, name = uri.rpartition("/")
    return folder, name


def probe(store: ObjectStore) -> None:
    """Prove that objects can be put, read and deleted, and that conditional puts are honoured; leaves nothing behind.

    Raises Refused (of a kind that says more, if there is one) or Unsupported with one sentence that names the storage
    and the remedy.
    """
    key = f"probe/{uuid.uuid4().hex}"
    data = key.encode()
    try:
        _prove(store, key, data)
        store.delete(key)
    except Refused as error:
        remedy = (
            "create the bucket" if isinstance(error, BucketMissing) else "allow reading, writing and deleting there"
        )
        raise type(error)(f"checkpoint.storage cannot be used: {error}; {remedy}, or choose another one") from error


def _prove(store: ObjectStore, key: str, data: bytes) -> None:
    with suppress(Exists):  # then it is our own, its answer was lost: the key is unique
        store.put(key, data, if_absent=True)
    try:
        store.put(key, b"", if_absent=True)
    except Exists:
        pass
    else:
        store.delete(key)
        raise _unsupported(store)
    try:
        kept = store.get(key)
    except Missing:
        kept = None
    if kept != data:
        store.delete(key)
        raise _unsupported(store)


def _unsupported(store: ObjectStore) -> Unsupported:
    return Unsupported(
        f"checkpoint.storage {store.describe()} does not honour conditional puts (If-None-Match): "
        "two generations could both write the history; choose a store that does"
    )
