"""Operations on a store by the rules of `lineage`: claim, record, commit, verify, retain."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from pretrain_api.checkpoint.lineage import (
    IDENTITY_KEY,
    JobIdentity,
    LineageRecord,
    Manifest,
    StoredObject,
    checkpoint_folder,
    manifest_key,
    parse_manifest_key,
    parse_record_key,
    record_key,
)
from pretrain_store.digest import digest_of
from pretrain_store.errors import CheckpointCorrupt, GenerationTaken, IdentityMismatch, ObjectExists, ObjectNotFound
from pretrain_store.lineage import Listing, is_chain_link
from pretrain_store.port import ObjectInfo, ObjectStore, Readable
from pretrain_store.retention import Deletion

_LINEAGE = "lineage/"
_CHECKPOINTS = "checkpoints/"
_FEW = 8
"""Up to this number records are read faster one after another than by threads that must be started."""


def read_listing(store: Readable, known: Listing | None = None) -> Listing:
    """Read the content of the prefix. Records never change: those of `known` are not read again.

    Records are read first and manifests after, so that every parent that a record names is committed by then.
    """
    earlier: Mapping[int, LineageRecord] = known.records if known is not None else {}
    numbers = _numbers(store)
    found = _read_records(store, [number for number in numbers if number not in earlier])
    records = {**{number: earlier[number] for number in numbers if number in earlier}, **found}
    manifests = frozenset(item.key for item in store.list(_CHECKPOINTS) if parse_manifest_key(item.key) is not None)
    return Listing(records, manifests, frozenset(numbers) - frozenset(records))


def claim_identity(store: ObjectStore, identity: JobIdentity) -> None:
    """Claim the prefix for this job, or raise IdentityMismatch with the differences, having written nothing."""
    try:
        store.put(IDENTITY_KEY, identity.to_json().encode(), if_absent=True)
    except ObjectExists:
        _refuse_other_identity(store, identity)


def put_record(store: ObjectStore, record: LineageRecord) -> None:
    """Put the record, whose number is then taken and the highest; raise GenerationTaken otherwise.

    Finding one's own record (same nonce) is success: an earlier answer was lost. So the call may be retried.
    """
    if not is_chain_link(record.generation, record):
        place = parse_manifest_key(record.parent or "")
        if place is None:
            raise ValueError(f"not a manifest's key: {record.parent}")
        raise GenerationTaken(place[0])
    try:
        store.put(record_key(record.generation), record.to_json().encode(), if_absent=True)
    except ObjectExists:
        there = _read_record(store, record.generation)
        if there is None or there.nonce != record.nonce:
            raise GenerationTaken(max(_numbers(store), default=record.generation)) from None
    highest = max(_numbers(store), default=0)
    if highest > record.generation:
        raise GenerationTaken(highest)


def commit(store: ObjectStore, manifest: Manifest) -> str:
    """Commit the objects of `manifest`, which are all in the store, as a checkpoint; return its key.

    Finding the same manifest is success: an earlier answer was lost. So the call may be retried, and so may the whole
    save of a step. Raises CheckpointCorrupt when other bytes are committed there.
    """
    key = manifest_key(manifest.generation, manifest.step)
    try:
        store.put(key, manifest.to_json().encode(), if_absent=True)
    except ObjectExists:
        there = read_manifest(store, key)
        if there.model_copy(update={"created_at": manifest.created_at}) != manifest:
            raise CheckpointCorrupt(key, "a manifest of other objects is here already") from None
    return key


def read_manifest(store: Readable, key: str) -> Manifest:
    """Read the manifest under `key`; raise CheckpointCorrupt when it is missing, unreadable or invalid."""
    try:
        manifest = Manifest.from_json(store.get(key))
    except ObjectNotFound:
        raise CheckpointCorrupt(key, "the manifest is missing") from None
    except ValidationError as error:
        raise CheckpointCorrupt(key, f"the manifest cannot be read ({error.error_count()} errors)") from None
    if manifest_key(manifest.generation, manifest.step) != key:
        raise CheckpointCorrupt(key, f"the manifest is that of generation {manifest.generation}, step {manifest.step}")
    for item in manifest.objects:
        if not _inside(item.key):
            raise CheckpointCorrupt(key, f"the manifest names an object outside its folder: {item.key}")
    return manifest


def verify(manifest: Manifest, folder: Path) -> None:
    """Check size and digest of every object of the checkpoint, fetched to `folder`; raise CheckpointCorrupt."""
    key = manifest_key(manifest.generation, manifest.step)
    for item in manifest.objects:
        if not _inside(item.key):
            raise CheckpointCorrupt(key, f"the manifest names an object outside its folder: {item.key}")
        path = folder / item.key
        if not path.is_file():
            raise CheckpointCorrupt(key, f"{item.key} is missing")
        _refuse_size(key, item, path.stat().st_size)
        _refuse_digest(key, item, digest_of(path).sha256)


def receive(store: ObjectStore, manifest: Manifest, item: StoredObject, into: memoryview) -> None:
    """Fill memory with an object of the checkpoint, verified as it is received.

    Raises CheckpointCorrupt, ObjectNotFound or another StoreError; then the memory's content must not be used.
    """
    key = manifest_key(manifest.generation, manifest.step)
    if not _inside(item.key):
        raise CheckpointCorrupt(key, f"the manifest names an object outside its folder: {item.key}")
    found = store.receive(f"{checkpoint_folder(manifest.generation, manifest.step)}/{item.key}", into)
    _refuse_size(key, item, found.size)
    _refuse_digest(key, item, found.sha256)


def retire(store: ObjectStore, plan: Deletion) -> tuple[str, ...]:
    """Delete the checkpoints of the plan, each manifest before its objects; return the deleted manifest keys.

    Looks for a later record before each checkpoint and stops if there is one: its owner may need the checkpoint.
    """
    gone: list[str] = []
    for key in plan.checkpoints:
        if _superseded(store, plan.generation):
            break
        store.delete(key)
        _delete_all(store, store.list(key.removesuffix("manifest.json")))
        gone.append(key)
    return tuple(gone)


def sweep(store: ObjectStore, generation: int) -> tuple[str, ...]:
    """Delete the folders of abandoned saves of generations below `generation`; return the folders.

    Unfinished uploads in parts are aborted as well. Saves of this and later generations are left alone, since they may
    be under way; an earlier generation's cannot enter the lineage any more.
    """
    folders: dict[str, list[ObjectInfo]] = {}
    for item in store.list(_CHECKPOINTS):
        folders.setdefault(_folder(item.key), []).append(item)
    orphans = [
        folder
        for folder, items in folders.items()
        if _is_before(folder, generation) and all(item.key != f"{folder}/manifest.json" for item in items)
    ]
    uploads = [item for item in store.list_uploads(_CHECKPOINTS) if _is_before(_folder(item.key), generation)]
    if not (orphans or uploads) or _superseded(store, generation):
        return ()
    for upload in uploads:
        store.abort(upload)
    for folder in orphans:
        _delete_all(store, tuple(folders[folder]))
    return tuple(orphans)


def _folder(key: str) -> str:
    """Return the folder of the checkpoint that an object belongs to."""
    return "/".join(key.split("/")[:3])


def _is_before(folder: str, generation: int) -> bool:
    place = parse_manifest_key(f"{folder}/manifest.json")
    return place is not None and place[0] < generation


def _superseded(store: ObjectStore, generation: int) -> bool:
    return max(_numbers(store), default=0) > generation


def _delete_all(store: ObjectStore, items: tuple[ObjectInfo, ...]) -> None:
    for item in items:
        store.delete(item.key)


def _numbers(store: Readable) -> list[int]:
    found = (parse_record_key(item.key) for item in store.list(_LINEAGE))
    return sorted(number for number in found if number is not None)


def _read_records(store: Readable, numbers: list[int]) -> dict[int, LineageRecord]:
    if len(numbers) <= _FEW:
        found = [_read_record(store, number) for number in numbers]
    else:
        with ThreadPoolExecutor(max_workers=16) as threads:
            found = list(threads.map(partial(_read_record, store), numbers))
    return {record.generation: record for record in found if record is not None}


def _read_record(store: Readable, number: int) -> LineageRecord | None:
    """Read the record of a number; None when it is unreadable or cannot be part of a chain."""
    try:
        record = LineageRecord.from_json(store.get(record_key(number)))
    except (ObjectNotFound, ValidationError):
        return None
    return record if is_chain_link(number, record) else None


_FIELDS = {
    "version": "format version",
    "model_digest": "model",
    "data_digest": "data",
    "tokenizer_digest": "tokeniser",
    "seed": "seed",
    "batch_sequences": "batch.sequences",
    "context": "context",
}


def _refuse_other_identity(store: ObjectStore, identity: JobIdentity) -> None:
    where = store.describe()
    try:
        there = JobIdentity.from_json(store.get(IDENTITY_KEY))
    except ValidationError:
        raise IdentityMismatch(
            f"{where} belongs to another job: its {IDENTITY_KEY} cannot be read; "
            "choose another prefix or path in checkpoint.storage"
        ) from None
    differing = [
        f"{name} is {getattr(identity, field)} here and {getattr(there, field)} there"
        if not field.endswith("_digest")
        else f"{name} differs"
        for field, name in _FIELDS.items()
        if getattr(identity, field) != getattr(there, field)
    ]
    if differing:
        raise IdentityMismatch(
            f"{where} belongs to another job ({', '.join(differing)}): "
            "choose another prefix or path in checkpoint.storage"
        )


def _refuse_size(key: str, item: StoredObject, size: int) -> None:
    if size != item.size:
        raise CheckpointCorrupt(key, f"{item.key} has {size} bytes instead of {item.size}")


def _refuse_digest(key: str, item: StoredObject, sha256: str) -> None:
    if sha256 != item.sha256:
        raise CheckpointCorrupt(key, f"{item.key} has another sha256 than was saved")


def _inside(key: str) -> bool:
    path = PurePosixPath(key)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
