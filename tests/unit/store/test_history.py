"""Operations on a store: lost answers, corrupt objects, races for a number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain_api.checkpoint.lineage import IDENTITY_KEY, checkpoint_folder, manifest_key, record_key
from pretrain_store.errors import CheckpointCorrupt, GenerationTaken, IdentityMismatch, ObjectNotFound, StoreUnavailable
from pretrain_store.history import (
    claim_identity,
    commit,
    put_record,
    read_listing,
    read_manifest,
    receive,
    retire,
    sweep,
    verify,
)
from pretrain_store.retention import Deletion
from support.store.values import MemoryStore, a_manifest, a_record, an_identity, save, stored


class LosesAnswers(MemoryStore):
    """Every conditional put happens and then says StoreUnavailable, once for each key."""

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        fresh = if_absent and key not in self.objects
        super().put(key, data, if_absent=if_absent)
        if fresh:
            raise StoreUnavailable("the answer was lost")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def test_a_put_whose_answer_was_lost_is_recognised_as_ones_own() -> None:
    store = LosesAnswers()
    record, manifest = a_record(1), a_manifest(1, 10, created_at="now")

    for attempt in range(2):
        try:
            put_record(store, record)
            commit(store, manifest.model_copy(update={"created_at": f"attempt {attempt}"}))
        except StoreUnavailable:
            continue
    put_record(store, record)

    assert commit(store, manifest) == manifest_key(1, 10)
    with pytest.raises(GenerationTaken):
        put_record(store, a_record(1, nonce="another"))


def test_a_number_below_the_highest_is_taken_even_when_its_record_is_not_there(store: MemoryStore) -> None:
    put_record(store, a_record(5))

    with pytest.raises(GenerationTaken) as raised:
        put_record(store, a_record(3))
    assert raised.value.highest == 5


def test_a_number_not_above_the_parent_is_taken(store: MemoryStore) -> None:
    save(store, 7, 10)

    with pytest.raises(GenerationTaken) as raised:
        put_record(store, a_record(1, (7, 10)))
    assert raised.value.highest == 7
    assert record_key(1) not in store.objects


def test_another_manifest_under_the_same_step_is_not_ones_own(store: MemoryStore) -> None:
    commit(store, a_manifest(1, 10, tokens=1))

    with pytest.raises(CheckpointCorrupt, match="a manifest of other objects"):
        commit(store, a_manifest(1, 10, tokens=2))


LOOP = a_record(2, (2, 10)).to_json().encode()
"""A record that names a parent of its own number."""


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", a_record(1).to_json().encode(), LOOP])
def test_a_record_that_cannot_be_read_still_owns_its_number(store: MemoryStore, content: bytes) -> None:
    put_record(store, a_record(1))
    store.put(record_key(2), content)

    listing = read_listing(store)

    assert (listing.highest, set(listing.records), listing.unreadable) == (2, {1}, {2})
    with pytest.raises(GenerationTaken):
        put_record(store, a_record(2, nonce="x"))


def test_records_that_are_known_are_not_read_again(store: MemoryStore) -> None:
    for number in range(1, 31):
        put_record(store, a_record(number))
    listing = read_listing(store)
    put_record(store, a_record(31))
    read: list[str] = []
    get = store.get
    store.get = lambda key: (read.append(key), get(key))[1]  # type: ignore[method-assign]

    again = read_listing(store, listing)

    assert read == [record_key(31)]
    assert set(again.records) == set(range(1, 32))


def test_an_identity_that_differs_is_named_with_the_remedy(store: MemoryStore) -> None:
    claim_identity(store, an_identity())

    with pytest.raises(IdentityMismatch) as raised:
        claim_identity(store, an_identity(model_digest="other", batch_sequences=16))
    assert str(raised.value) == (
        "memory belongs to another job (model differs, batch.sequences is 16 here and 8 there): "
        "choose another prefix or path in checkpoint.storage"
    )


def test_an_identity_that_cannot_be_read_is_not_written_over(store: MemoryStore) -> None:
    store.put(IDENTITY_KEY, b"something else")

    with pytest.raises(IdentityMismatch, match=r"job\.json cannot be read; choose another prefix"):
        claim_identity(store, an_identity())
    assert store.get(IDENTITY_KEY) == b"something else"


def test_a_manifest_that_is_not_what_its_key_says_is_corrupt(store: MemoryStore) -> None:
    key = manifest_key(1, 10)
    with pytest.raises(CheckpointCorrupt, match="the manifest is missing"):
        read_manifest(store, key)
    store.put(key, b"{")
    with pytest.raises(CheckpointCorrupt, match="cannot be read"):
        read_manifest(store, key)
    store.put(key, a_manifest(1, 20).to_json().encode())
    with pytest.raises(CheckpointCorrupt, match="that of generation 1, step 20"):
        read_manifest(store, key)


@pytest.mark.parametrize("outside", ["../../other", "/etc/passwd", "", "a/../../b"])
def test_a_manifest_cannot_name_what_is_outside_its_folder(store: MemoryStore, tmp_path: Path, outside: str) -> None:
    manifest = a_manifest(1, 10, [stored(outside, b"")])
    store.put(manifest_key(1, 10), manifest.to_json().encode())

    with pytest.raises(CheckpointCorrupt, match="outside its folder"):
        read_manifest(store, manifest_key(1, 10))
    with pytest.raises(CheckpointCorrupt, match="outside its folder"):
        verify(manifest, tmp_path)
    with pytest.raises(CheckpointCorrupt, match="outside its folder"):
        receive(store, manifest, manifest.objects[0], memoryview(b""))


def test_an_object_is_checked_as_it_is_received(store: MemoryStore) -> None:
    item = stored("shard", b"22")
    manifest, key, memory = a_manifest(1, 10, [item]), f"{checkpoint_folder(1, 10)}/shard", bytearray(2)

    with pytest.raises(ObjectNotFound, match="shard"):
        receive(store, manifest, item, memoryview(memory))
    store.put(key, b"2")
    with pytest.raises(CheckpointCorrupt, match="shard has 1 bytes instead of 2"):
        receive(store, manifest, item, memoryview(memory))
    store.put(key, b"23")
    with pytest.raises(CheckpointCorrupt, match="another sha256") as raised:
        receive(store, manifest, item, memoryview(memory))
    assert raised.value.key == manifest_key(1, 10)
    store.put(key, b"22")
    receive(store, manifest, item, memoryview(memory))
    assert memory == b"22"


def test_every_object_is_checked_before_it_counts(tmp_path: Path) -> None:
    manifest = a_manifest(1, 10, [stored("first", b"1"), stored("below/second", b"22")])
    (tmp_path / "first").write_bytes(b"1")
    with pytest.raises(CheckpointCorrupt, match="below/second is missing"):
        verify(manifest, tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "second").write_bytes(b"2")
    with pytest.raises(CheckpointCorrupt, match="has 1 bytes instead of 2"):
        verify(manifest, tmp_path)
    (tmp_path / "below" / "second").write_bytes(b"23")
    with pytest.raises(CheckpointCorrupt, match="another sha256") as raised:
        verify(manifest, tmp_path)
    assert raised.value.key == manifest_key(1, 10)
    (tmp_path / "below" / "second").write_bytes(b"22")
    verify(manifest, tmp_path)


def test_a_manifest_goes_before_its_objects(store: MemoryStore) -> None:
    put_record(store, a_record(1))
    key = save(store, 1, 10)
    deleted: list[str] = []
    delete = store.delete
    store.delete = lambda key: (deleted.append(key), delete(key))[1]  # type: ignore[method-assign]

    assert retire(store, Deletion(1, (key,))) == (key,)
    assert deleted[0] == key
    assert len(deleted) == 2


def test_a_plan_is_dropped_when_a_later_record_came(store: MemoryStore) -> None:
    put_record(store, a_record(1))
    key = save(store, 1, 10)
    save(store, 1, 20, committed=False)
    put_record(store, a_record(2, (1, 10)))
    put_record(store, a_record(3, (1, 10)))

    assert retire(store, Deletion(2, (key,))) == ()
    assert sweep(store, 2) == ()
    assert len(store.list("checkpoints/")) == 3


def test_a_sweep_leaves_own_and_later_saves_and_strangers_alone(store: MemoryStore) -> None:
    put_record(store, a_record(1))
    save(store, 1, 10)
    save(store, 1, 20, committed=False)
    put_record(store, a_record(2, (1, 10)))
    save(store, 2, 30, committed=False)
    save(store, 3, 30, committed=False)
    store.put("checkpoints/notes/of/somebody.txt", b"")

    assert sweep(store, 2) == ("checkpoints/g000001/step-000000020",)
    assert len(store.list("checkpoints/")) == 5


def test_what_is_on_disk_is_camel_case_json(store: MemoryStore) -> None:
    put_record(store, a_record(1, job_uid="uid"))

    assert json.loads(store.get("lineage/g000001.json"))["jobUid"] == "uid"
