"""Port to the storage of checkpoints: a folder or a bucket, below one prefix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pretrain_api.checkpoint.lineage import StoredObject
from pretrain_store.digest import Digest


@dataclass(frozen=True)
class ObjectInfo:
    """An object in a listing; `size` in bytes."""

    key: str
    size: int


@dataclass(frozen=True)
class MultipartUpload:
    """An upload in parts that is neither complete nor aborted: its parts take room and no listing shows them."""

    key: str
    upload: str


@dataclass(frozen=True)
class RetryLimits:
    """Limits of one request to a service: the number of attempts, and the seconds for each."""

    attempts: int
    connect_seconds: float
    read_seconds: float


FULL_RETRIES = RetryLimits(attempts=4, connect_seconds=5, read_seconds=30)
"""For requests that must succeed if they can: up to minutes."""
FEW_RETRIES = RetryLimits(attempts=2, connect_seconds=2, read_seconds=3)
"""For a check of reachability, which is repeated anyway: at most 7 s."""


class Readable(Protocol):
    """A store that can be read. Every method raises ObjectNotFound, StoreUnavailable or StoreRefused."""

    def get(self, key: str) -> bytes:
        """Return the object's bytes."""
        ...

    def fetch(self, key: str, path: Path) -> None:
        """Write the object to a local file, which replaces one at `path`."""
        ...

    def list(self, prefix: str) -> tuple[ObjectInfo, ...]:
        """Return all objects whose keys start with `prefix`, sorted by key."""
        ...

    def describe(self) -> str:
        """Return the location for messages."""
        ...


class ObjectReader(Readable, Protocol):
    """A store of objects that are never written here, and can be checked for replacement."""

    def version(self, key: str) -> str:
        """Return a text that changes when the object is replaced; its bytes are not read."""
        ...


class ObjectStore(Protocol):
    """Objects under keys relative to one prefix, like `lineage/g000007.json`. Safe for threads and many processes.

    An object appears whole or not at all, and every get and list that starts after the put returned sees it.
    A key and the same key with `/…` after it exclude each other. Every method raises StoreUnavailable or StoreRefused.
    """

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """Store `data` under `key`; with `if_absent`, raise ObjectExists and change nothing if the key is taken.

        After StoreUnavailable the put may have happened nevertheless, or may happen a little later.
        """
        ...

    def put_file(self, key: str, path: Path) -> StoredObject:
        """Stream a local file to `key`; return key, size and sha256 of the bytes sent."""
        ...

    def get(self, key: str) -> bytes:
        """Return the object's bytes; raise ObjectNotFound."""
        ...

    def fetch(self, key: str, path: Path) -> None:
        """Write the object to a local, read-only file, which replaces one at `path`; raise ObjectNotFound."""
        ...

    def receive(self, key: str, into: memoryview) -> Digest:
        """Fill memory of the object's size with its bytes; return the digest of the memory's content.

        An object of another size is not read: the digest has its size, and the sha256 of no bytes. Raises
        ObjectNotFound.
        """
        ...

    def list(self, prefix: str) -> tuple[ObjectInfo, ...]:
        """Return all objects whose keys start with `prefix`, sorted by key."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; succeed if there is none."""
        ...

    def list_uploads(self, prefix: str) -> tuple[MultipartUpload, ...]:
        """Return unfinished uploads in parts to keys that start with `prefix`, those under way included."""
        ...

    def abort(self, upload: MultipartUpload) -> None:
        """Abort an upload, which fails for its writer; succeed if there is none."""
        ...

    def describe(self) -> str:
        """Return the location for messages."""
        ...
