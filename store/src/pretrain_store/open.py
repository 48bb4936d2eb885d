"""From a job's storage to a store that is known to work."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pretrain_api.job import Storage
from pretrain_store.directory import DirectoryStore
from pretrain_store.errors import Exists, Missing, Refused, Unsupported
from pretrain_store.port import ObjectStore


def open_store(storage: Storage, environ: Mapping[str, str]) -> ObjectStore:
    """The store of a job; `storage.path` is absolute by now. Nothing is asked of it yet: see `probe`.

    S3 takes credentials from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN in `environ`, else where
    boto3 finds them; its endpoint from the storage, else from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, else AWS.
    """
    if storage.s3 is not None:
        from pretrain_store.s3 import open_s3  # boto3 takes 0.3 s to import: only for whom it serves

        return open_s3(storage.s3, environ)
    assert storage.path is not None
    store = DirectoryStore(Path(storage.path))
    store.clear_litter()
    return store


def probe(store: ObjectStore) -> None:
    """Prove that objects can be put, read and deleted, and that conditional puts are honoured; leaves nothing behind.

    Raises Refused or Unsupported with one sentence that names the storage and the remedy.
    """
    key = f"probe/{uuid.uuid4().hex}"
    data = key.encode()
    try:
        _prove(store, key, data)
        store.delete(key)
    except Refused as error:
        raise Refused(
            f"checkpoint.storage cannot be used: {error}; "
            "allow reading, writing and deleting there, or choose another one"
        ) from error


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
