"""Restoring from the store: each object is read and verified by one rank, which passes it on, and then all load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pretrain_agent.scratch import Scratch
from pretrain_api.lineage import Manifest, checkpoint_folder
from pretrain_store.history import verify
from pretrain_store.port import ObjectStore
from pretrain_trainer.checkpoint.layout import METADATA
from pretrain_trainer.checkpoint.loading import Loading, Unusable, read_metadata
from pretrain_trainer.checkpoint.passing import broadcast, exchange
from pretrain_trainer.checkpoint.target import Target
from pretrain_trainer.checkpoint.together import Together
from pretrain_trainer.stages import Stages

_PARALLEL = 4


def restore(
    together: Together,
    store: ObjectStore,
    manifest: Manifest,
    target: Target,
    sharded: bool,
    environ: Mapping[str, str],
) -> dict[str, float]:
    """Load a checkpoint into the target; returns the seconds by stage. Collective; raises as `all_or_none` does.

    Replicated state is read by the first rank and broadcast. Of sharded state every rank wants some files; one of
    those that want a file reads it.
    """
    first = together.ranks.first
    stages = Stages()
    with Scratch.with_room(manifest.bytes if first or sharded else 0, environ) as scratch:

        def fetched(names: Sequence[str]) -> None:
            _fetch(store, manifest, scratch.path, names)

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
    wanted = manifest.model_copy(
        update={"objects": tuple(item for item in manifest.objects if item.key in names)}
    )  # fmt: skip
    missing = set(names) - {item.key for item in wanted.objects}
    if missing:
        raise Unusable(f"its manifest does not name {min(missing)}")
    prefix = checkpoint_folder(manifest.generation, manifest.step)
    fetched = [(f"{prefix}/{name}", folder / name) for name in names]
    if len(fetched) == 1:
        store.fetch(*fetched[0])
    elif fetched:
        with ThreadPoolExecutor(max_workers=_PARALLEL) as threads:
            list(threads.map(lambda pair: store.fetch(*pair), fetched))
    verify(wanted, folder)
