"""The cache of shards: bounded, shared, and verified by digest."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pretrain_store.errors import CredentialsRejected, ObjectNotFound, StoreError, StoreUnavailable
from pretrain_store.port import ObjectInfo
from pretrain_trainer.core import errors
from pretrain_trainer.datasets.shard_cache import REJECTED_SECONDS, RemoteShard, ShardCache

UINT16 = np.dtype("<u2")
SIZE = 2000
NOTHING: frozenset[str] = frozenset()


@dataclass
class Bucket:
    """Objects that are read, and a count of how often each was fetched. `spoiled` fetches bring something else."""

    objects: dict[str, bytes] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    spoiled: int = 0
    failure: StoreError | None = None

    def get(self, key: str) -> bytes:
        if self.failure is not None:
            raise self.failure
        if key not in self.objects:
            raise ObjectNotFound(key)
        return self.objects[key]

    def fetch(self, key: str, path: Path) -> None:
        data = self.get(key)
        self.fetched.append(key)
        self.spoiled -= 1
        path.write_bytes(data if self.spoiled < 0 else data[:-1] + b"!")

    def version(self, key: str) -> str:
        return hashlib.md5(self.get(key)).hexdigest()

    def list(self, prefix: str) -> tuple[ObjectInfo, ...]:
        return tuple(ObjectInfo(key, len(data)) for key, data in self.objects.items() if key.startswith(prefix))

    def describe(self) -> str:
        return "s3://corpus/web"


def tokens(number: int) -> np.ndarray:
    return np.arange(SIZE // 2, dtype=UINT16) + number


def a_shard(bucket: Bucket, number: int) -> RemoteShard:
    """A shard of SIZE bytes that is in the bucket."""
    data = tokens(number).tobytes()
    bucket.objects[f"{number:05d}.bin"] = data
    return described(lambda: bucket, number)


def described(reader: Callable[[], Bucket], number: int) -> RemoteShard:
    digest = hashlib.sha256(tokens(number).tobytes()).hexdigest()
    return RemoteShard(reader, "s3://corpus/web", f"{number:05d}.bin", SIZE, digest, UINT16, "sources[web].uri")


def held(folder: Path) -> set[str]:
    """Digests of the whole shards in the cache."""
    return {path.stem for path in folder.glob("*.bin")}


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


# --- fetching and verifying -------------------------------------------------------------------------------------------


def test_a_shard_is_fetched_once_and_mapped(tmp_path: Path) -> None:
    bucket, cache = Bucket(), ShardCache(tmp_path, 10 * SIZE)
    shard = a_shard(bucket, 7)

    first, second = cache.tokens(shard), cache.tokens(shard)

    assert first.tolist() == second.tolist() == tokens(7).tolist()
    assert isinstance(first, np.memmap)
    assert bucket.fetched == ["00007.bin"]


def test_bytes_corrupted_in_transit_are_fetched_again(tmp_path: Path) -> None:
    bucket, cache = Bucket(spoiled=1), ShardCache(tmp_path, 10 * SIZE)

    assert cache.tokens(a_shard(bucket, 7)).tolist() == tokens(7).tolist()
    assert len(bucket.fetched) == 2


@pytest.mark.parametrize("content", [b"poison" * 300, tokens(7).tobytes()[:-1], tokens(7).tobytes() + b"x", b""])
def test_a_shard_that_differs_from_its_description_is_never_mapped(tmp_path: Path, content: bytes) -> None:
    bucket, cache = Bucket(), ShardCache(tmp_path, 10 * SIZE)
    shard = a_shard(bucket, 7)
    bucket.objects[shard.name] = content

    with pytest.raises(errors.DataCorrupt, match=r"sources\[web\].uri: s3://corpus/web/00007.bin differs from"):
        cache.tokens(shard)

    assert len(bucket.fetched) == 2
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".lock", "")] == []


def test_a_corrupt_shard_is_fetched_again_only_when_replaced_or_after_a_long_time(tmp_path: Path) -> None:
    bucket, clock = Bucket(), Clock()
    cache, shard = ShardCache(tmp_path, 10 * SIZE, clock), a_shard(bucket, 7)
    bucket.objects[shard.name] = b"poison"
    for _ in range(5):
        with pytest.raises(errors.DataCorrupt):
            cache.tokens(shard)
    at_first = len(bucket.fetched)
    clock.now = REJECTED_SECONDS
    with pytest.raises(errors.DataCorrupt):
        cache.tokens(shard)
    later = len(bucket.fetched)

    a_shard(bucket, 7)

    assert cache.tokens(shard).tolist() == tokens(7).tolist()
    assert (at_first, later, len(bucket.fetched)) == (2, 4, 5)


@pytest.mark.parametrize(
    ("failure", "obstacle"),
    [
        (ObjectNotFound("00007.bin"), errors.DataMissing),
        (StoreUnavailable("no answer"), errors.StorageUnavailable),
        (CredentialsRejected("no"), errors.AccessDeniedError),
        (StoreError("nonsense"), errors.InvalidInput),
    ],
)
def test_errors_of_the_store_name_the_source(tmp_path: Path, failure: StoreError, obstacle: type) -> None:
    bucket, cache = Bucket(), ShardCache(tmp_path, 10 * SIZE)
    shard = a_shard(bucket, 7)
    bucket.failure = failure

    with pytest.raises(obstacle, match=r"^sources\[web\].uri: "):
        cache.tokens(shard)
    bucket.failure = None

    assert cache.tokens(shard).tolist() == tokens(7).tolist()


def test_a_cache_that_cannot_be_written_is_waited_for(tmp_path: Path) -> None:
    bucket, folder = Bucket(), tmp_path / "cache"
    folder.write_text("in the way")
    cache, shard = ShardCache(folder, 10 * SIZE), a_shard(bucket, 7)

    with pytest.raises(errors.StorageUnavailable, match=r"the cache .* cannot take s3://corpus/web/00007.bin"):
        cache.tokens(shard)
    folder.unlink()

    assert cache.tokens(shard).tolist() == tokens(7).tolist()


# --- a warm cache -----------------------------------------------------------------------------------------------------


def test_a_later_process_finds_what_was_fetched_and_checks_no_digest_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Bucket()
    shard = a_shard(bucket, 7)
    ShardCache(tmp_path, 10 * SIZE).tokens(shard)
    monkeypatch.setattr("pretrain_trainer.datasets.shard_cache.digested", lambda _: pytest.fail("checked again"))

    assert ShardCache(tmp_path, 10 * SIZE).tokens(shard).tolist() == tokens(7).tolist()
    assert len(bucket.fetched) == 1


@pytest.mark.parametrize("change", ["rewritten", "replaced", "truncated"])
def test_a_file_that_was_changed_is_verified_and_fetched_again_when_corrupt(tmp_path: Path, change: str) -> None:
    bucket, cache = Bucket(), ShardCache(tmp_path, 10 * SIZE)
    shard = a_shard(bucket, 7)
    cache.tokens(shard)
    (path,) = tmp_path.glob("*.bin")
    before = path.stat()
    if change == "replaced":
        (tmp_path / "other").write_bytes(b"\0" * SIZE)
        (tmp_path / "other").replace(path)
    elif change == "rewritten":
        with path.open("r+b") as file:
            file.write(b"poison")
    else:
        os.truncate(path, SIZE - 2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert cache.tokens(shard).tolist() == tokens(7).tolist()
    assert len(bucket.fetched) == 2


def test_a_file_whose_check_was_forgotten_is_checked_and_not_fetched(tmp_path: Path) -> None:
    bucket, cache = Bucket(), ShardCache(tmp_path, 10 * SIZE)
    shard = a_shard(bucket, 7)
    cache.tokens(shard)
    for marker in tmp_path.glob("*.verified"):
        marker.unlink()

    assert cache.tokens(shard).tolist() == tokens(7).tolist()
    assert len(bucket.fetched) == 1


# --- room -------------------------------------------------------------------------------------------------------------


def used_at(folder: Path, shard: RemoteShard, time: float) -> None:
    os.utime(folder / f"{shard.sha256}.verified", (time, time))


def test_the_least_recently_used_shard_is_evicted(tmp_path: Path) -> None:
    bucket, cache = Bucket(), ShardCache(tmp_path, 2 * SIZE + SIZE // 2)
    first, second, third = (a_shard(bucket, number) for number in range(3))
    for time, shard in enumerate((first, second, first)):
        cache.tokens(shard)
        used_at(tmp_path, shard, time)

    cache.tokens(third)

    assert held(tmp_path) == {first.sha256, third.sha256}
    assert {path.stem for path in tmp_path.glob("*.verified")} == held(tmp_path)


def test_use_counts_even_without_a_fetch(tmp_path: Path) -> None:
    bucket, cache = Bucket(), ShardCache(tmp_path, 2 * SIZE)
    first, second, third = (a_shard(bucket, number) for number in range(3))
    for shard in (first, second):
        cache.tokens(shard)
        used_at(tmp_path, shard, 0)
    cache.tokens(first)

    cache.tokens(third)

    assert held(tmp_path) == {first.sha256, third.sha256}


def test_the_cache_never_holds_more_than_it_may(tmp_path: Path) -> None:
    bucket, cache = Bucket(), ShardCache(tmp_path, 3 * SIZE)
    for number in np.random.default_rng(1).integers(0, 8, 60).tolist():
        assert cache.tokens(a_shard(bucket, number)).tolist() == tokens(number).tolist()
        assert sum(path.stat().st_size for path in tmp_path.glob("*.[bp][ia][nr]*")) <= 3 * SIZE


def test_a_mapping_outlives_the_file(tmp_path: Path) -> None:
    bucket, cache = Bucket(), ShardCache(tmp_path, SIZE)
    first = a_shard(bucket, 1)
    mapped = cache.tokens(first)

    cache.tokens(a_shard(bucket, 2))

    assert first.sha256 not in held(tmp_path)
    assert mapped.tolist() == tokens(1).tolist()


def test_a_prefetch_evicts_no_shard_that_is_needed_before(tmp_path: Path) -> None:
    bucket, cache = Bucket(), ShardCache(tmp_path, 2 * SIZE)
    old, near, far = (a_shard(bucket, number) for number in range(3))
    keep = frozenset({near.sha256, far.sha256})
    cache.tokens(old)

    assert cache.fetch_ahead(near, keep)
    assert cache.fetch_ahead(far, keep), "the old one makes room"
    assert held(tmp_path) == keep
    assert not cache.fetch_ahead(old, keep)
    assert held(tmp_path) == keep
    assert cache.tokens(old).tolist() == tokens(0).tolist(), "what is needed now gets room in any case"


def test_a_shard_larger_than_the_cache_is_refused_with_the_sizes(tmp_path: Path) -> None:
    bucket, cache = Bucket(), ShardCache(tmp_path, SIZE - 1)

    with pytest.raises(errors.InvalidInput, match=r"00001.bin has 2000 bytes, and the cache .* holds 1999 in all"):
        cache.tokens(a_shard(bucket, 1))
    assert bucket.fetched == []


# --- many processes ---------------------------------------------------------------------------------------------------


HANG_SECONDS = 300
"""Processes that contend for one cache make progress; a loaded machine makes them slow."""


class FolderBucket(Bucket):
    """A bucket for many processes: objects are files, and each fetch leaves a file."""

    def __init__(self, folder: Path, fetches: Path) -> None:
        super().__init__()
        self._folder, self._fetches = folder, fetches

    def get(self, key: str) -> bytes:
        return (self._folder / key).read_bytes()

    def fetch(self, key: str, path: Path) -> None:
        (self._fetches / f"{key}.{os.getpid()}").touch()
        path.write_bytes(self.get(key))


class DeadlyBucket(FolderBucket):
    """Kills its process in the middle of a fetch."""

    def fetch(self, key: str, path: Path) -> None:
        path.with_name(f"{path.name}.half").write_bytes(b"\0" * SIZE)
        os.kill(os.getpid(), signal.SIGKILL)


def _read_all(bucket: Bucket, cache: Path, capacity: int, numbers: list[int], out: Path) -> None:
    shards = ShardCache(cache, capacity)
    right = all(shards.tokens(described(lambda: bucket, n)).tolist() == tokens(n).tolist() for n in numbers)
    (out / f"{os.getpid()}").write_text(str(right))


def in_processes(*targets: Callable[[], None]) -> list[int | None]:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANG_SECONDS)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path, Path]:
    """Objects, fetches, cache, answers."""
    made = tuple(tmp_path / name for name in ("objects", "fetches", "cache", "answers"))
    for folder in made:
        folder.mkdir()
    for number in range(8):
        (made[0] / f"{number:05d}.bin").write_bytes(tokens(number).tobytes())
    return made  # type: ignore[return-value]


def test_many_processes_share_one_download(folders: tuple[Path, Path, Path, Path]) -> None:
    objects, fetches, cache, answers = folders
    read = partial(_read_all, FolderBucket(objects, fetches), cache, 10 * SIZE, list(range(8)), answers)

    codes = in_processes(*[read] * 4)

    assert codes == [0] * 4
    assert [path.read_text() for path in answers.iterdir()] == ["True"] * 4
    assert sorted(path.name.rpartition(".")[0] for path in fetches.iterdir()) == [f"{n:05d}.bin" for n in range(8)]


def test_processes_that_need_other_shards_progress_in_a_cache_with_room_for_one(
    folders: tuple[Path, Path, Path, Path],
) -> None:
    objects, fetches, cache, answers = folders
    bucket = FolderBucket(objects, fetches)
    orders = ([0, 1, 2, 3] * 5, [3, 2, 1, 0] * 5, [4, 0, 4, 0] * 5)

    codes = in_processes(*(partial(_read_all, bucket, cache, SIZE, order, answers) for order in orders))

    assert codes == [0] * 3
    assert [path.read_text() for path in answers.iterdir()] == ["True"] * 3


def test_the_download_of_a_killed_process_holds_no_space(folders: tuple[Path, Path, Path, Path]) -> None:
    objects, fetches, cache, answers = folders
    dying = partial(_read_all, DeadlyBucket(objects, fetches), cache, 2 * SIZE, [1], answers)
    assert in_processes(dying) == [-signal.SIGKILL]
    assert list(cache.glob("*.part*")), "it left something behind"
    shards = ShardCache(cache, 2 * SIZE)

    for number in (2, 3):
        shards.fetch_ahead(described(lambda: FolderBucket(objects, fetches), number), NOTHING)

    assert len(held(cache)) == 2
    assert list(cache.glob("*.part*")) == []
