"""A bounded folder of shards fetched from S3, shared by all ranks of a host and by later processes.

Files are named by their digest, so jobs with the same data share them:

```
<sha256>.bin        a whole shard, renamed to this after its digest was verified
<sha256>.verified   identity (inode, size, times) of the verified file; its mtime is the time of last use
<sha256>.part       space reserved for a running download; the bytes arrive in <sha256>.part.<id>
<sha256>.lock       held while a shard is fetched or verified: one download for all processes
lock                held while space is reserved, for milliseconds
```

A reader maps the shard and drops the mapping when it has copied what it needs. Any shard may be evicted at any time: no
process holds one while it waits for space for another, and a mapping of a deleted file stays valid.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pretrain_store.digest import digest_of, digested
from pretrain_store.errors import ObjectNotFound, StoreError
from pretrain_store.port import ObjectReader
from pretrain_trainer.core.errors import DataCorrupt, DataMissing, InvalidInput, StorageUnavailable
from pretrain_trainer.core.waits import field_error

REJECTED_SECONDS = 300.0
"""Interval between downloads of a corrupt object that was not replaced."""
_DOWNLOADS = 2
"""Downloads before a shard counts as corrupt: a single wrong digest may be a network error."""
_ROOM_SECONDS = 0.1


@dataclass(frozen=True)
class RemoteShard:
    """A shard in S3: the object `name` of `reader`, `size` bytes with this digest.

    `folder` is its location in messages, and `field` the field of the job that names it.
    """

    reader: Callable[[], ObjectReader]
    folder: str
    name: str
    size: int
    sha256: str
    dtype: np.dtype[np.unsignedinteger]
    field: str

    @property
    def uri(self) -> str:
        """The location in messages."""
        return f"{self.folder}/{self.name}"


class ShardCache:
    """At most `capacity` bytes of shards in a folder. Safe for concurrent threads and processes."""

    def __init__(self, folder: Path, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._capacity = capacity
        self._clock = clock
        self._rejected: dict[str, tuple[str, float]] = {}
        """Version of corrupt objects and the time until which they are not fetched again, by digest."""

    def tokens(self, shard: RemoteShard) -> NDArray[np.unsignedinteger]:
        """Map a shard's tokens, verified, and fetched if necessary. The mapping lasts as long as the returned array.

        Raises an Obstacle (DataMissing, DataCorrupt, StorageUnavailable, …), or InvalidInput where waiting is useless.
        """
        with self._present(shard, frozenset()) as file:
            assert file is not None  # only fetch_ahead may find no space
            return np.memmap(file, dtype=shard.dtype, mode="r")

    def fetch_ahead(self, shard: RemoteShard, keep: frozenset[str]) -> bool:
        """Fetch a shard before it is needed, without evicting the digests `keep`; return True if it is in the cache.

        Raises the errors of `tokens`.
        """
        with self._present(shard, keep | {shard.sha256}) as file:
            return file is not None

    @contextmanager
    def _present(self, shard: RemoteShard, keep: frozenset[str]) -> Generator[BinaryIO | None]:
        try:
            file = self._verified(shard) or self._made_present(shard, keep)
        except OSError as error:
            raise StorageUnavailable(
                f"{shard.field}: the cache {self._folder} cannot take {shard.uri} ({error.strerror or error}): "
                "free space there, or make it writable; training resumes by itself"
            ) from error
        try:
            yield file
        finally:
            if file is not None:
                file.close()

    def _made_present(self, shard: RemoteShard, keep: frozenset[str]) -> BinaryIO | None:
        if shard.size > self._capacity:
            raise InvalidInput(
                f"{shard.field}: shard {shard.uri} has {shard.size} bytes, and the cache {self._folder} holds "
                f"{self._capacity} in all: enlarge the cache, or tokenise the data again with smaller shards"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        with _locked(self._path(shard.sha256, "lock")):
            if file := self._verified(shard) or self._checked(shard):
                return file
            self._refuse_rejected(shard)
            if not self._take_room(shard, keep):
                return None
            try:
                return self._fetched(shard)
            finally:
                self._path(shard.sha256, "part").unlink(missing_ok=True)

    # --- lookup

    def _verified(self, shard: RemoteShard) -> BinaryIO | None:
        """Open the file if it was verified and has not changed since; mark it as used now."""
        marker = self._path(shard.sha256, "verified")
        try:
            file = self._path(shard.sha256, "bin").open("rb")
        except FileNotFoundError:
            return None
        with suppress(FileNotFoundError):
            if marker.read_text() == _identity(file):
                os.utime(marker)
                return file
        file.close()
        return None

    def _checked(self, shard: RemoteShard) -> BinaryIO | None:
        """Open the file and verify its digest; remove a corrupt one."""
        path = self._path(shard.sha256, "bin")
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            return None
        if digested(file).sha256 != shard.sha256:
            file.close()
            path.unlink(missing_ok=True)
            return None
        self._path(shard.sha256, "verified").write_text(_identity(file))
        return file

    # --- fetching

    def _fetched(self, shard: RemoteShard) -> BinaryIO:
        part, version = self._path(shard.sha256, "part"), ""
        for attempt in range(_DOWNLOADS):
            with _named(shard):
                if attempt:
                    version = shard.reader().version(shard.name)
                shard.reader().fetch(shard.name, part)
            if digest_of(part).sha256 == shard.sha256:
                return self._put_in_place(shard, part)
        self._rejected[shard.sha256] = (version, self._clock() + REJECTED_SECONDS)
        raise _corrupt(shard)

    def _put_in_place(self, shard: RemoteShard, part: Path) -> BinaryIO:
        path = self._path(shard.sha256, "bin")
        part.replace(path)
        file = path.open("rb")
        self._path(shard.sha256, "verified").write_text(_identity(file))
        return file

    def _refuse_rejected(self, shard: RemoteShard) -> None:
        """Raise DataCorrupt for an object that was corrupt a short time ago, unless it was replaced."""
        version, until = self._rejected.get(shard.sha256, ("", 0.0))
        if self._clock() >= until:
            return
        with _named(shard):
            if shard.reader().version(shard.name) == version:
                raise _corrupt(shard)

    # --- space

    def _take_room(self, shard: RemoteShard, keep: frozenset[str]) -> bool:
        """Reserve space for a shard. With `keep`, a prefetch, return False instead of waiting for other downloads."""
        while True:
            with _locked(self._folder / "lock"):
                if self._evict(shard, keep):
                    with self._path(shard.sha256, "part").open("wb") as part:
                        part.truncate(shard.size)
                    return True
            if keep:
                return False
            time.sleep(_ROOM_SECONDS)

    def _evict(self, shard: RemoteShard, keep: frozenset[str]) -> bool:
        """Evict the least recently used shards until there is space; none if that cannot suffice."""
        self._remove_abandoned(shard.sha256)
        sizes = {path: _size(path) for path in self._folder.iterdir() if path.suffix in (".bin", ".part")}
        excess = sum(sizes.values()) + shard.size - self._capacity
        spare = [path for path in sizes if path.suffix == ".bin" and path.stem not in keep]
        if excess > sum(sizes[path] for path in spare):
            return False
        for path in sorted(spare, key=self._last_used):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            path.with_suffix(".verified").unlink(missing_ok=True)
            excess -= sizes[path]
        return True

    def _remove_abandoned(self, own: str) -> None:
        """Remove downloads of dead processes, whose locks are free, and earlier ones of this shard."""
        for path in self._folder.glob("*.part*"):
            digest = path.name.partition(".")[0]
            with suppress(BlockingIOError):
                if digest == own:
                    path.unlink(missing_ok=True)
                else:
                    with _locked(self._path(digest, "lock"), fcntl.LOCK_EX | fcntl.LOCK_NB):
                        path.unlink(missing_ok=True)

    def _last_used(self, path: Path) -> float:
        try:
            return path.with_suffix(".verified").stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _path(self, digest: str, suffix: str) -> Path:
        return self._folder / f"{digest}.{suffix}"


@contextmanager
def _locked(path: Path, how: int = fcntl.LOCK_EX) -> Generator[None]:
    lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, how)
        yield
    finally:
        os.close(lock)


@contextmanager
def _named(shard: RemoteShard) -> Generator[None]:
    """Translate errors of the store, with the field of the source."""
    try:
        yield
    except ObjectNotFound as error:
        raise DataMissing(
            f"{shard.field}: there is no {shard.uri}, which the source's description names: upload it; "
            "training resumes by itself"
        ) from error
    except StoreError as error:
        raise field_error(error, shard.field) from error


def _corrupt(shard: RemoteShard) -> DataCorrupt:
    return DataCorrupt(
        f"{shard.field}: {shard.uri} differs from the source's description (another sha256): upload it again; "
        "training resumes by itself"
    )


def _identity(file: BinaryIO) -> str:
    """Identify the file's content: differs after a write to the file or its replacement."""
    found = os.fstat(file.fileno())
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
