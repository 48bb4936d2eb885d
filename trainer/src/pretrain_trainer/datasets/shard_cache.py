"""A bounded folder of shards fetched from S3, shared by all ranks of a host and by those that come after them.

Files are named by their digest, so jobs with the same data share them:

```
<sha256>.bin        a whole shard, put here by a rename after its digest was checked
<sha256>.verified   which file (inode, size, times) was checked; its own mtime is when the shard was last used
<sha256>.part       room taken for a download under way; the bytes arrive in <sha256>.part.<id>
<sha256>.lock       held while a shard is fetched or checked: one download for all, whoever needs it
lock                held while room is taken, for milliseconds
```

A reader maps the shard and drops the mapping when it has copied what it needs. So any shard may be deleted at any time:
nobody holds one while it waits for room for another, and whoever maps a deleted one reads on.
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
from pretrain_trainer.core.waits import of_field

CONDEMNED_SECONDS = 300.0
"""A shard that was found wrong and not replaced since is fetched again so seldom."""
_DOWNLOADS = 2
"""A digest that is wrong once may be the network's fault."""
_ROOM_SECONDS = 0.1


@dataclass(frozen=True)
class RemoteShard:
    """A shard in S3: the object `name` of `reader`, `size` bytes with this digest.

    `folder` is where that is, for people, and `field` where the job says so.
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
        """Where it is, for people."""
        return f"{self.folder}/{self.name}"


class ShardCache:
    """At most `capacity` bytes of shards in a folder. May be used by many threads and processes at once."""

    def __init__(self, folder: Path, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._capacity = capacity
        self._clock = clock
        self._condemned: dict[str, tuple[str, float]] = {}
        """Version and end of the term of shards that were found wrong, by digest."""

    def tokens(self, shard: RemoteShard) -> NDArray[np.unsignedinteger]:
        """The shard's tokens, mapped and verified; fetched if need be. The mapping lasts as long as what is returned.

        Raises an Obstacle (DataMissing, DataCorrupt, StorageUnavailable, …), or InvalidInput when there is no use in
        waiting.
        """
        with self._present(shard, frozenset()) as file:
            assert file is not None  # what is needed now makes room for itself
            return np.memmap(file, dtype=shard.dtype, mode="r")

    def fetch_ahead(self, shard: RemoteShard, keep: frozenset[str]) -> bool:
        """Have the shard here before it is needed, unless that takes room from the digests `keep`; whether it is here.

        Raises what `tokens` raises.
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
                "make room there, or let it be written; training goes on by itself"
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
                f"{self._capacity} in all: give the cache more room, or make the data anew with smaller shards"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        with _locked(self._path(shard.sha256, "lock")):
            if file := self._verified(shard) or self._checked(shard):
                return file
            self._refuse_condemned(shard)
            if not self._take_room(shard, keep):
                return None
            try:
                return self._fetched(shard)
            finally:
                self._path(shard.sha256, "part").unlink(missing_ok=True)

    # --- what is here

    def _verified(self, shard: RemoteShard) -> BinaryIO | None:
        """The open file, if it is the very one that was checked, not touched since; it counts as used now."""
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
        """The open file after its digest was checked; one that is not what it should be is removed."""
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
        self._condemned[shard.sha256] = (version, self._clock() + CONDEMNED_SECONDS)
        raise _corrupt(shard)

    def _put_in_place(self, shard: RemoteShard, part: Path) -> BinaryIO:
        path = self._path(shard.sha256, "bin")
        part.replace(path)
        file = path.open("rb")
        self._path(shard.sha256, "verified").write_text(_identity(file))
        return file

    def _refuse_condemned(self, shard: RemoteShard) -> None:
        """Do not fetch again and again what is wrong: see first whether it was replaced."""
        version, until = self._condemned.get(shard.sha256, ("", 0.0))
        if self._clock() >= until:
            return
        with _named(shard):
            if shard.reader().version(shard.name) == version:
                raise _corrupt(shard)

    # --- room

    def _take_room(self, shard: RemoteShard, keep: frozenset[str]) -> bool:
        """Make room and claim it. Only what is not ahead of need waits for other downloads to end."""
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
        """Delete what was used longest ago until the shard has room; nothing if that cannot be enough."""
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
        """Remove the downloads of processes that are gone: nobody holds their locks. And one's own earlier ones."""
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
    """The store's errors as this program's, with the source's field."""
    try:
        yield
    except ObjectNotFound as error:
        raise DataMissing(
            f"{shard.field}: there is no {shard.uri}, which the source's description names: upload it; "
            "training goes on by itself"
        ) from error
    except StoreError as error:
        raise of_field(error, shard.field) from error


def _corrupt(shard: RemoteShard) -> DataCorrupt:
    return DataCorrupt(
        f"{shard.field}: {shard.uri} is not what the source's description says (another sha256): upload it again; "
        "training goes on by itself"
    )


def _identity(file: BinaryIO) -> str:
    """What differs as soon as somebody writes to the file, or puts another one in its place."""
    found = os.fstat(file.fileno())
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
