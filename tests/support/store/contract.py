"""Contract of every ObjectStore, as tests: subclass with a fixture `store`."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from pretrain_api.spec.job import Retain
from pretrain_store.digest import Digest
from pretrain_store.errors import GenerationTaken, IdentityMismatch, ObjectExists, ObjectNotFound
from pretrain_store.history import (
    claim_identity,
    commit,
    put_record,
    read_listing,
    read_manifest,
    retire,
    sweep,
    verify,
)
from pretrain_store.lineage import checkpoint_chain
from pretrain_store.open import probe
from pretrain_store.port import ObjectStore
from pretrain_store.retention import plan_retention
from support.store.values import a_manifest, a_record, an_identity, save

RACERS = 16
LARGE = (33 << 20) + 1
"""Bytes: more than two parts of an S3 object, and not a multiple of anything."""
NOTHING = hashlib.sha256(b"").hexdigest()


def keys(store: ObjectStore, prefix: str = "") -> list[str]:
    return [item.key for item in store.list(prefix)]


class StoreContract:
    def test_what_was_put_is_got(self, store: ObjectStore) -> None:
        store.put("folder/name.json", b"\x00bytes")

        assert store.get("folder/name.json") == b"\x00bytes"

    def test_an_object_may_be_empty(self, store: ObjectStore, tmp_path: Path) -> None:
        store.put("empty", b"")
        store.fetch("empty", tmp_path / "empty")

        assert store.receive("empty", memoryview(b"")) == Digest(0, NOTHING)
        assert store.get("empty") == (tmp_path / "empty").read_bytes() == b""

    def test_a_put_replaces(self, store: ObjectStore) -> None:
        store.put("key", b"old")
        store.put("key", b"new")

        assert store.get("key") == b"new"

    def test_a_conditional_put_of_a_taken_key_changes_nothing(self, store: ObjectStore) -> None:
        store.put("key", b"first", if_absent=True)

        with pytest.raises(ObjectExists, match="key"):
            store.put("key", b"second", if_absent=True)
        assert store.get("key") == b"first"

    def test_a_deleted_key_can_be_taken_again(self, store: ObjectStore) -> None:
        store.put("a/key", b"first", if_absent=True)
        store.delete("a/key")
        store.put("a/key", b"second", if_absent=True)

        assert store.get("a/key") == b"second"

    def test_of_racing_conditional_puts_exactly_one_wins(self, store: ObjectStore) -> None:
        barrier = Barrier(RACERS)

        def race(number: int) -> int | None:
            barrier.wait()
            try:
                store.put("race/key", str(number).encode(), if_absent=True)
            except ObjectExists:
                return None
            return number

        with ThreadPoolExecutor(RACERS) as threads:
            winners = [number for number in threads.map(race, range(RACERS)) if number is not None]

        assert [store.get("race/key")] == [str(number).encode() for number in winners]

    def test_a_missing_object_is_said_to_be_missing(self, store: ObjectStore, tmp_path: Path) -> None:
        store.put("folder/other", b"")

        for key in ("folder/key", "nowhere/key"):
            with pytest.raises(ObjectNotFound, match=key):
                store.get(key)
            with pytest.raises(ObjectNotFound, match=key):
                store.fetch(key, tmp_path / "file")
            with pytest.raises(ObjectNotFound, match=key):
                store.receive(key, memoryview(bytearray(1)))
        assert list(tmp_path.iterdir()) == []

    def test_a_large_file_comes_back_bit_equal_with_the_digest_of_its_bytes(
        self, store: ObjectStore, tmp_path: Path
    ) -> None:
        data = hashlib.shake_256(b"seed").digest(LARGE)
        (tmp_path / "source").write_bytes(data)

        stored = store.put_file("folder/large", tmp_path / "source")
        store.fetch("folder/large", tmp_path / "below" / "copy")

        assert (stored.key, stored.size) == ("folder/large", LARGE)
        assert stored.sha256 == hashlib.sha256(data).hexdigest()
        assert (tmp_path / "below" / "copy").read_bytes() == data
        assert [(item.key, item.size) for item in store.list("")] == [("folder/large", LARGE)]

    def test_a_large_object_is_received_in_memory_with_the_digest_of_what_lies_there(self, store: ObjectStore) -> None:
        data = hashlib.shake_256(b"seed").digest(LARGE)
        store.put("folder/large", data)
        memory = bytearray(LARGE)

        found = store.receive("folder/large", memoryview(memory))

        assert memory == data
        assert found == Digest(LARGE, hashlib.sha256(data).hexdigest())

    @pytest.mark.parametrize("size", [0, 3, 5])
    def test_an_object_of_another_size_than_the_memory_is_not_received(self, store: ObjectStore, size: int) -> None:
        store.put("key", b"four")
        memory = bytearray(size)

        assert store.receive("key", memoryview(memory)) == Digest(4, NOTHING)
        assert memory == bytes(size)

    def test_what_happens_to_the_source_later_does_not_matter(self, store: ObjectStore, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.write_bytes(b"before")
        store.put_file("key", source)
        source.write_bytes(b"after!")

        assert store.get("key") == b"before"

    def test_fetch_replaces_the_file_and_leaves_nothing_beside_it(self, store: ObjectStore, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"old and longer")
        store.put("key", b"new")

        store.fetch("key", tmp_path / "file")

        assert (tmp_path / "file").read_bytes() == b"new"
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_list_takes_a_prefix_of_the_key_and_sorts(self, store: ObjectStore) -> None:
        for key in ("b/2", "b/10", "b/1/x", "bb/1", "a"):
            store.put(key, key.encode())

        assert keys(store) == ["a", "b/1/x", "b/10", "b/2", "bb/1"]
        assert keys(store, "b/") == ["b/1/x", "b/10", "b/2"]
        assert keys(store, "b/1") == ["b/1/x", "b/10"]
        assert keys(store, "b") == ["b/1/x", "b/10", "b/2", "bb/1"]
        assert keys(store, "c/") == keys(store, "c") == []
        assert [item.size for item in store.list("b/1")] == [5, 4]

    def test_to_delete_what_is_not_there_is_success(self, store: ObjectStore) -> None:
        store.put("folder/key", b"")
        store.delete("folder/key")
        store.delete("folder/key")
        store.delete("nowhere/key")

        assert keys(store) == []

    def test_the_probe_passes_and_leaves_nothing(self, store: ObjectStore) -> None:
        probe(store)

        assert keys(store) == []

    def test_another_job_is_refused_the_prefix(self, store: ObjectStore) -> None:
        claim_identity(store, an_identity())
        claim_identity(store, an_identity())

        with pytest.raises(IdentityMismatch, match=r"seed is 2 here and 1 there\): choose another prefix"):
            claim_identity(store, an_identity(seed=2))

    def test_a_history_is_written_read_verified_and_retired(self, store: ObjectStore, tmp_path: Path) -> None:
        put_record(store, a_record(1))
        for step in (10, 20, 30):
            save(store, 1, step)
        with pytest.raises(GenerationTaken, match="1"):
            put_record(store, a_record(1, nonce="another"))
        save(store, 1, 40, committed=False)
        put_record(store, a_record(2, (1, 30)))
        (tmp_path / "shard").write_bytes(b"state")
        shard = store.put_file("checkpoints/g000002/step-000000050/shard", tmp_path / "shard")
        newest = commit(store, a_manifest(2, 50, [shard.model_copy(update={"key": "shard"})]))

        listing = read_listing(store)
        plan = plan_retention(listing, 2, Retain(last=2))
        retired = retire(store, plan)
        swept = sweep(store, 2)

        assert checkpoint_chain(listing)[0] == newest
        verify(read_manifest(store, newest), tmp_path)
        assert retired == plan.checkpoints == ("checkpoints/g000001/step-000000010/manifest.json",
                                               "checkpoints/g000001/step-000000020/manifest.json")  # fmt: skip
        assert swept == ("checkpoints/g000001/step-000000040",)
        assert checkpoint_chain(read_listing(store, listing)) == (
            newest,
            "checkpoints/g000001/step-000000030/manifest.json",
        )
        assert len(keys(store, "checkpoints/")) == 4
