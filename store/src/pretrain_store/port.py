"""The port to whatever keeps the checkpoints: a folder or a bucket, below one prefix."""

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
class Unfinished:
    """An upload in parts that was neither completed nor aborted: its parts take room and no listing shows them."""

    key: str
    upload: str


@dataclass(frozen=True)
class Patience:
    """How long one request to a service goes on: attempts in all, and seconds for each."""

    attempts: int
    connect_seconds: float
    read_seconds: float


ENDURING = Patience(attempts=4, connect_seconds=5, read_seconds=30)
"""For what must succeed if it can: up to minutes."""
LOOKING = Patience(attempts=2, connect_seconds=2, read_seconds=3)
"""For a look whether the service is there, which is repeated anyway: 7 s at most."""


class Readable(Protocol):
    """What can be read of a store. Every method raises Missing, Unavailable or Refused."""

    def get(self, key: str) -> bytes:
        """The object's bytes."""
        ...

    def fetch(self, key: str, path: Path) -> None:
        """The object as a local file, which replaces one at `path`."""
        ...

    def list(self, prefix: str) -> tuple[ObjectInfo, ...]:
        """All objects whose keys start with `prefix`, sorted by key."""
        ...

    def describe(self) -> str:
        """Where this is, for people."""
        ...


class ObjectReader(Readable, Protocol):
    """Objects that are read and never written, of which it can be told whether they were replaced."""

    def version(self, key: str) -> str:
        """A text that differs when the object was replaced; its bytes are not read."""
        ...


class ObjectStore(Protocol):
    """Objects under keys relative to one prefix, like `lineage/g000007.json`. Safe for threads and many processes.

    An object appears whole or not at all, and every get and list that starts after the put returned sees it.
    A key and the same key with `/…` after it exclude each other. Every method raises Unavailable or Refused.
    """

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """Keep `data` under `key`; with `if_absent` raises Exists when there is an object, and changes nothing.

        After Unavailable it may have happened nevertheless, now or a little later.
        """
        ...

    def put_file(self, key: str, path: Path) -> StoredObject:
        """Stream a local file to `key`; returns key, size and sha256 of the very bytes that were sent."""
        ...

    def get(self, key: str) -> bytes:
        """The object's bytes; raises Missing."""
        ...

    def fetch(self, key: str, path: Path) -> None:
        """The object as a local file, which replaces one at `path` and is for reading only; raises Missing."""
        ...

    def receive(self, key: str, into: memoryview) -> Digest:
        """Fill memory of the object's size with its bytes; returns the digest of what lies there now; raises Missing.

        An object of another size is not read: the digest tells its size, and is of no bytes.
        """
        ...

    def list(self, prefix: str) -> tuple[ObjectInfo, ...]:
        """All objects whose keys start with `prefix`, sorted by key."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; that there is none is success."""
        ...

    def unfinished(self, prefix: str) -> tuple[Unfinished, ...]:
        """Uploads in parts to keys that start with `prefix`, those under way included; none where nothing has parts."""
        ...

    def abort(self, upload: Unfinished) -> None:
        """Give up an upload; whoever is at it fails. That there is none is success."""
        ...

    def describe(self) -> str:
        """Where this is, for people."""
        ...
