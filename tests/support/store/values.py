"""Values and stores for tests of checkpoint storage: made by one call, valid unless asked otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from pretrain_api.checkpoint.lineage import (
    JobIdentity,
    LineageRecord,
    Manifest,
    Rollback,
    StepRange,
    StoredObject,
    checkpoint_folder,
    manifest_key,
)
from pretrain_store.digest import Digest
from pretrain_store.errors import ObjectExists, ObjectNotFound
from pretrain_store.lineage import Listing
from pretrain_store.port import MultipartUpload, ObjectInfo, ObjectStore


class MemoryStore:
    """An ObjectStore in a dict."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        if if_absent and key in self.objects:
            raise ObjectExists(key)
        self.objects[key] = data

    def put_file(self, key: str, path: Path) -> StoredObject:
        data = path.read_bytes()
        self.put(key, data)
        return stored(key, data)

    def get(self, key: str) -> bytes:
        try:
            return self.objects[key]
        except KeyError:
            raise ObjectNotFound(key) from None

    def fetch(self, key: str, path: Path) -> None:
        path.write_bytes(self.get(key))

    def receive(self, key: str, into: memoryview) -> Digest:
        data = self.get(key)
        if len(data) != len(into):
            return Digest(len(data), "")
        into[:] = data
        return Digest(len(data), hashlib.sha256(data).hexdigest())

    def list(self, prefix: str) -> tuple[ObjectInfo, ...]:
        return tuple(ObjectInfo(key, len(self.objects[key])) for key in sorted(self.objects) if key.startswith(prefix))

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def list_uploads(self, prefix: str) -> tuple[MultipartUpload, ...]:
        return ()

    def abort(self, upload: MultipartUpload) -> None:
        raise AssertionError("there are no uploads in parts")

    def describe(self) -> str:
        return "memory"


def stored(key: str, data: bytes) -> StoredObject:
    return StoredObject(key=key, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def an_identity(
    *, model_digest: str = "m", data_digest: str = "d", seed: int = 1, batch_sequences: int = 8
) -> JobIdentity:
    return JobIdentity(
        model_digest=model_digest,
        data_digest=data_digest,
        tokenizer_digest="t",
        seed=seed,
        batch_sequences=batch_sequences,
        context=64,
    )


def a_record(
    generation: int,
    parent: tuple[int, int] | None = None,
    *,
    nonce: str = "",
    job_uid: str = "job",
    rejected: Iterable[str] = (),
    rollbacks: Iterable[Rollback] = (),
    skipped: Iterable[tuple[int, int]] = (),
) -> LineageRecord:
    return LineageRecord(
        generation=generation,
        nonce=nonce or f"nonce-{generation}",
        job_uid=job_uid,
        parent=None if parent is None else manifest_key(*parent),
        world_size=1,
        rejected=tuple(rejected),
        rollbacks=tuple(rollbacks),
        skipped=tuple(StepRange(first=first, last=last) for first, last in skipped),
        reason="Started",
    )


def a_rollback(generation: int, to_step: int, since: int = 99) -> Rollback:
    return Rollback(
        generation=generation, job_uid="job", cause="LossSpike", step=since + 2, since=since, to_step=to_step
    )


def a_manifest(
    generation: int, step: int, objects: Iterable[StoredObject] = (), *, created_at: str = "", tokens: int = 0
) -> Manifest:
    return Manifest(
        generation=generation,
        step=step,
        tokens=tokens,
        world_size=1,
        job_uid="job",
        objects=tuple(objects),
        created_at=created_at,
    )


def a_listing(
    records: Iterable[LineageRecord], manifests: Iterable[tuple[int, int]], unreadable: Iterable[int] = ()
) -> Listing:
    return Listing(
        {record.generation: record for record in records},
        frozenset(manifest_key(*place) for place in manifests),
        frozenset(unreadable),
    )


def save(store: ObjectStore, generation: int, step: int, data: bytes = b"shard", *, committed: bool = True) -> str:
    """Put the objects of a checkpoint and, unless told otherwise, its manifest; returns the manifest's key."""
    store.put(f"{checkpoint_folder(generation, step)}/shard.distcp", data)
    if committed:
        manifest = a_manifest(generation, step, [stored("shard.distcp", data)])
        store.put(manifest_key(generation, step), manifest.to_json().encode(), if_absent=True)
    return manifest_key(generation, step)
