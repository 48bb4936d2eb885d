"""Restoring from the store: each object is read and verified by one rank, which passes it on, and then all load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from pretrain_agent.scratch import Scratch
from pretrain_api.lineage import Manifest, StoredObject, checkpoint_folder
from pretrain_store.errors import Unavailable
from pretrain_store.history import verify
from pretrain_store.port import ObjectStore
from pretrain_trainer.checkpoint.atonce import each
from pretrain_trainer.checkpoint.layout import METADATA
from pretrain_trainer.checkpoint.loading import PARALLEL, Loading, Unusable, read_metadata
from pretrain_trainer.checkpoint.passing import broadcast, exchange
from pretrain_trainer.checkpoint.target import Target
from pretrain_trainer.checkpoint.together import Together
from pretrain_trainer.stages import Stages


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

    Replicated state is read by the first rank and broadcast. Of sharded state every rank wants some files; one of
    those that want a file reads it. `near`: where what is fetched are links, which saves copying it to memory.
    """
    first = together.ranks.first
    stages = Stages()
    with ExitStack() as folders:
        scratch = folders.enter_context(Scratch.with_room(manifest.bytes if first or sharded else 0, environ))
        linked = Scratch.beside(near) if near is not None and (first or sharded) else None
        links = folders.enter_context(linked).path if linked is not None else None

        def fetched(names: Sequence[str]) -> None:
            _fetch(store, manifest, links or scratch.path, names)
            if links is not None:
                for name in names:
                    (scratch.path / name).symlink_to(links / name)

        together.all_or_none(lambda: fetched((METADATA,) if first else ()))
        content = together.agreement.first_says((scratch.path / METADATA).read_bytes() if first else b"")
        loading = together.all_or_none(lambda: target.plan(read_metadata(content), together.key))
        if sharded:
            _share(together, manifest, loading, scratch.path, fetched)
            stages.done("verify")
            together.all_or_none(lambda: loading.load(scratch.path))
        else:
            together.all_or_none(lambda: fetched(loading.files if first else ()))
            stages.done("verify")
            together.all_or_none(lambda: loading.load(scratch.path) if first else None)
            broadcast(target.tensors(), 0)
        stages.done("load")
    return stages.seconds


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


def _share(
    together: Together,
    manifest: Manifest,
    loading: Loading,
    folder: Path,
    fetched: Callable[[Sequence[str]], None],
) -> None:
    """Bring to `folder` the files that this rank wants, reading its share of what all want."""
    wanted = together.agreement.all_say(frozenset(loading.files))
    readers = owners(wanted, manifest)
    together.all_or_none(lambda: fetched([name for name, rank in readers.items() if rank == together.ranks.rank]))
    exchange(wanted, {name: (rank,) for name, rank in readers.items()}, lambda name: folder / name)


def _fetch(store: ObjectStore, manifest: Manifest, folder: Path, names: Sequence[str]) -> None:
    """Fetch objects of a checkpoint to `folder` and verify them. Raises one of DAMAGED, or StoreError."""
    wanted = {item.key: item for item in manifest.objects if item.key in names}
    missing = set(names) - wanted.keys()
    if missing:
        raise Unusable(f"its manifest does not name {min(missing)}")
    prefix = checkpoint_folder(manifest.generation, manifest.step)

    def fetch(item: StoredObject) -> None:
        store.fetch(f"{prefix}/{item.key}", folder / item.key)
        try:
            verify(manifest.model_copy(update={"objects": (item,)}), folder)
        except OSError as error:  # a link is read here for the first time
            raise Unavailable(f"{store.describe()}: {item.key}: {error.strerror or error}") from error

    each(fetch, wanted.values(), PARALLEL)
