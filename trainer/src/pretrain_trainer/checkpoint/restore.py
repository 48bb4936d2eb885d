"""Restoring from the store: each object is read and verified by one rank, which passes it on, and then all load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from pretrain_api.checkpoint.lineage import Manifest, StoredObject, checkpoint_folder
from pretrain_sdk.scratch import Scratch
from pretrain_store.errors import StoreUnavailable
from pretrain_store.history import receive, verify
from pretrain_store.port import ObjectStore
from pretrain_trainer.checkpoint.collective import Together
from pretrain_trainer.checkpoint.dcp.layout import METADATA
from pretrain_trainer.checkpoint.dcp.load import PARALLEL, Loading, Received, Unusable, read_metadata, room_in
from pretrain_trainer.checkpoint.dcp.target import Target
from pretrain_trainer.checkpoint.dcp.transfer import broadcast, exchange
from pretrain_trainer.core.parallel_map import each
from pretrain_trainer.core.stage_timer import StageTimer


def restore(
    together: Together,
    store: ObjectStore,
    manifest: Manifest,
    target: Target,
    sharded: bool,
    environ: Mapping[str, str],
    near: Path | None = None,
) -> dict[str, float]:
    """Load a checkpoint into the target; returns the seconds by stage. Collective; raises as `all_or_none` does.

    Replicated state is read by the first rank and broadcast; where it can be, into the very memory that the state is in
    afterwards. Of sharded state every rank wants some files; one of those that want a file reads it. `near`: where what
    is fetched are links, which saves copying it to memory.
    """
    first = together.ranks.first
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
        together.all_or_none(lambda: objects.fetch((METADATA,) if first else ()))
        content = together.collectives.broadcast_object(objects.read(METADATA) if first else b"")
        loading = together.all_or_none(lambda: target.plan(read_metadata(content), together.key))
        if isinstance(objects, _InFolder) and sharded:
            _share(together, manifest, loading, objects)
            stages.done("verify")
            together.all_or_none(lambda: objects.load(target, loading))
        else:
            together.all_or_none(lambda: objects.fetch(loading.files if first else ()))
            stages.done("verify")
            together.all_or_none(lambda: objects.load(target, loading) if first else None)
            broadcast(target.tensors(), 0)
        stages.done("load")
    return stages.seconds


class _InMemory:
    """Objects in memory that becomes the state: what is read is digested while it is in the cache, and not copied."""

    def __init__(self, store: ObjectStore, manifest: Manifest) -> None:
        self._store = store
        self._manifest = manifest
        self._received: dict[str, Received] = {}

    def fetch(self, names: Sequence[str]) -> None:
        """Receive and verify these. Raises one of DAMAGED, or StoreError."""

        def fetch(item: StoredObject) -> None:
            self._received[item.key] = received = Received(item.size)
            receive(self._store, self._manifest, item, received.bytes)

        each(fetch, _named(self._manifest, names), PARALLEL)

    def read(self, name: str) -> bytes:
        """An object that was fetched."""
        return bytes(self._received[name].bytes)

    def load(self, target: Target, loading: Loading) -> None:
        """Have them be the target's state; raises Unusable before anything changes."""
        target.take(loading, self._received)


class _InFolder:
    """Objects as files: in memory or, in the folder `links`, links to the objects. The state is copied from them."""

    def __init__(self, store: ObjectStore, manifest: Manifest, folder: Path, links: Path | None) -> None:
        self._store = store
        self._manifest = manifest
        self.folder = folder
        self._links = links

    def fetch(self, names: Sequence[str]) -> None:
        """Fetch and verify these. Raises one of DAMAGED, or StoreError."""

        def fetch(item: StoredObject) -> None:
            if self._links is not None:
                self._link(item, self._links)
            else:
                receive(self._store, self._manifest, item, room_in(self.folder / item.key, item.size))

        each(fetch, _named(self._manifest, names), PARALLEL)

    def read(self, name: str) -> bytes:
        """An object that was fetched."""
        return (self.folder / name).read_bytes()

    def _link(self, item: StoredObject, links: Path) -> None:
        prefix = checkpoint_folder(self._manifest.generation, self._manifest.step)
        self._store.fetch(f"{prefix}/{item.key}", links / item.key)
        try:
            verify(self._manifest.model_copy(update={"objects": (item,)}), links)
        except OSError as error:  # it is read here for the first time
            raise StoreUnavailable(f"{self._store.describe()}: {item.key}: {error.strerror or error}") from error
        (self.folder / item.key).symlink_to(links / item.key)

    def load(self, target: Target, loading: Loading) -> None:
        """Copy them to the target's state; raises Unusable before anything changes."""
        loading.load(self.folder)


def _named(manifest: Manifest, names: Sequence[str]) -> tuple[StoredObject, ...]:
    wanted = {item.key: item for item in manifest.objects if item.key in names}
    missing = set(names) - wanted.keys()
    if missing:
        raise Unusable(f"its manifest does not name {min(missing)}")
    return tuple(wanted.values())


def owners(wanted: Sequence[frozenset[str]], manifest: Manifest) -> dict[str, int]:
    """Which rank reads each object that any rank wants: one that wants it, so that all read about as many bytes."""
    sizes = {item.key: item.size for item in manifest.objects}
    loads = [0] * len(wanted)
    chosen: dict[str, int] = {}
    for name in sorted(frozenset[str]().union(*wanted), key=lambda name: (-sizes.get(name, 0), name)):
        owner = min((rank for rank, names in enumerate(wanted) if name in names), key=lambda rank: loads[rank])
        loads[owner] += sizes.get(name, 0)
        chosen[name] = owner
    return chosen


def _share(together: Together, manifest: Manifest, loading: Loading, objects: _InFolder) -> None:
    """Bring to the folder the files that this rank wants, reading its share of what all want."""
    wanted = together.collectives.all_gather_object(frozenset(loading.files))
    readers = owners(wanted, manifest)
    together.all_or_none(lambda: objects.fetch([name for name, rank in readers.items() if rank == together.ranks.rank]))
    exchange(wanted, {name: (rank,) for name, rank in readers.items()}, lambda name: objects.folder / name)
