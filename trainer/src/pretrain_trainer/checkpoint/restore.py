"""Restore from the store: one rank reads and verifies each object and sends it to the others, then all load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from pretrain_api.checkpoint.lineage import Manifest, StoredObject, checkpoint_folder
from pretrain_sdk.scratch import Scratch
from pretrain_store.errors import StoreUnavailable
from pretrain_store.history import receive, verify
from pretrain_store.port import ObjectStore
from pretrain_trainer.checkpoint.dcp.layout import METADATA
from pretrain_trainer.checkpoint.dcp.load import (
    PARALLEL,
    ReceivedObject,
    TensorLoader,
    UnusableFiles,
    map_new_file,
    read_metadata,
)
from pretrain_trainer.checkpoint.dcp.restore_group import RestoreGroup
from pretrain_trainer.checkpoint.dcp.target import RestoreTarget
from pretrain_trainer.checkpoint.dcp.transfer import broadcast_tensors, exchange_files
from pretrain_trainer.core.parallel_map import each
from pretrain_trainer.core.stage_timer import StageTimer


def restore(
    group: RestoreGroup,
    store: ObjectStore,
    manifest: Manifest,
    target: RestoreTarget,
    sharded: bool,
    environ: Mapping[str, str],
    near: Path | None = None,
) -> dict[str, float]:
    """Load a checkpoint into the target; return the seconds by stage. Collective; raises as `all_or_none` does.

    Replicated state is read by rank 0 and broadcast; if possible, into memory that becomes the state's. Of sharded
    state every rank wants some files; one of the ranks that want a file reads it. `near`: a folder into which objects
    are fetched as links, which saves copying them to memory.
    """
    first = group.ranks.first
    stages = StageTimer()
    with ExitStack() as folders:
        objects: _InMemory | _InFolder
        if not sharded and target.replaceable:
            objects = _InMemory(store, manifest)
        else:
            scratch = folders.enter_context(Scratch.with_room(manifest.bytes if first or sharded else 0, environ))
            linked = Scratch.beside(near) if near is not None and (first or sharded) else None
            links = folders.enter_context(linked).path if linked is not None else None
            objects = _InFolder(store, manifest, scratch.path, links)
        group.all_or_none(lambda: objects.fetch((METADATA,) if first else ()))
        content = group.collectives.broadcast_object(objects.read(METADATA) if first else b"")
        loading = group.all_or_none(lambda: target.plan(read_metadata(content), group.key))
        if isinstance(objects, _InFolder) and sharded:
            _fetch_shared(group, manifest, loading, objects)
            stages.done("verify")
            group.all_or_none(lambda: objects.load(target, loading))
        else:
            group.all_or_none(lambda: objects.fetch(loading.files if first else ()))
            stages.done("verify")
            group.all_or_none(lambda: objects.load(target, loading) if first else None)
            broadcast_tensors(target.tensors(), 0)
        stages.done("load")
    return stages.seconds


class _InMemory:
    """Objects in memory that becomes the state: digested while they are in the cache, and not copied."""

    def __init__(self, store: ObjectStore, manifest: Manifest) -> None:
        self._store = store
        self._manifest = manifest
        self._received: dict[str, ReceivedObject] = {}

    def fetch(self, names: Sequence[str]) -> None:
        """Receive and verify these objects. Raises one of DAMAGED, or StoreError."""

        def fetch(item: StoredObject) -> None:
            self._received[item.key] = received = ReceivedObject(item.size)
            receive(self._store, self._manifest, item, received.bytes)

        each(fetch, _named(self._manifest, names), PARALLEL)

    def read(self, name: str) -> bytes:
        """Return the content of a fetched object."""
        return bytes(self._received[name].bytes)

    def load(self, target: RestoreTarget, loading: TensorLoader) -> None:
        """Make the objects the target's state. Raises UnusableFiles before anything changes."""
        target.take(loading, self._received)


class _InFolder:
    """Objects as files that the state is copied from: in memory, or links to the objects in the folder `links`."""

    def __init__(self, store: ObjectStore, manifest: Manifest, folder: Path, links: Path | None) -> None:
        self._store = store
        self._manifest = manifest
        self.folder = folder
        self._links = links

    def fetch(self, names: Sequence[str]) -> None:
        """Fetch and verify these objects. Raises one of DAMAGED, or StoreError."""

        def fetch(item: StoredObject) -> None:
            if self._links is not None:
                self._link(item, self._links)
            else:
                receive(self._store, self._manifest, item, map_new_file(self.folder / item.key, item.size))

        each(fetch, _named(self._manifest, names), PARALLEL)

    def read(self, name: str) -> bytes:
        """Return the content of a fetched object."""
        return (self.folder / name).read_bytes()

    def _link(self, item: StoredObject, links: Path) -> None:
        prefix = checkpoint_folder(self._manifest.generation, self._manifest.step)
        self._store.fetch(f"{prefix}/{item.key}", links / item.key)
        try:
            verify(self._manifest.model_copy(update={"objects": (item,)}), links)
        except OSError as error:  # the link is read here for the first time
            raise StoreUnavailable(f"{self._store.describe()}: {item.key}: {error.strerror or error}") from error
        (self.folder / item.key).symlink_to(links / item.key)

    def load(self, target: RestoreTarget, loading: TensorLoader) -> None:
        """Copy the objects to the target's state. Raises UnusableFiles before anything changes."""
        loading.load(self.folder)


def _named(manifest: Manifest, names: Sequence[str]) -> tuple[StoredObject, ...]:
    wanted = {item.key: item for item in manifest.objects if item.key in names}
    missing = set(names) - wanted.keys()
    if missing:
        raise UnusableFiles(f"its manifest does not name {min(missing)}")
    return tuple(wanted.values())


def assign_readers(wanted: Sequence[frozenset[str]], manifest: Manifest) -> dict[str, int]:
    """Assign each object to one of the ranks that want it, so that all ranks read about as many bytes."""
    sizes = {item.key: item.size for item in manifest.objects}
    loads = [0] * len(wanted)
    chosen: dict[str, int] = {}
    for name in sorted(frozenset[str]().union(*wanted), key=lambda name: (-sizes.get(name, 0), name)):
        owner = min((rank for rank, names in enumerate(wanted) if name in names), key=lambda rank: loads[rank])
        loads[owner] += sizes.get(name, 0)
        chosen[name] = owner
    return chosen


def _fetch_shared(group: RestoreGroup, manifest: Manifest, loading: TensorLoader, objects: _InFolder) -> None:
    """Read this rank's share of the wanted files, and exchange them for the ones that it wants."""
    wanted = group.collectives.all_gather_object(frozenset(loading.files))
    readers = assign_readers(wanted, manifest)
    group.all_or_none(lambda: objects.fetch([name for name, rank in readers.items() if rank == group.ranks.rank]))
    exchange_files(wanted, {name: (rank,) for name, rank in readers.items()}, lambda name: objects.folder / name)
