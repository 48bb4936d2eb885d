"""Restore of a snapshot from the memory of workers: each from its own memory, or sent by those that have it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pretrain_sdk.scratch import Scratch
from pretrain_trainer.checkpoint.dcp.layout import METADATA
from pretrain_trainer.checkpoint.dcp.load import merge_metadata, read_metadata
from pretrain_trainer.checkpoint.dcp.restore_group import RestoreGroup
from pretrain_trainer.checkpoint.dcp.target import RestoreTarget
from pretrain_trainer.checkpoint.dcp.transfer import broadcast_tensors, exchange_files
from pretrain_trainer.checkpoint.memory.plan import MemorySnapshot, WorkerMemory
from pretrain_trainer.core.stage_timer import StageTimer


def restore_from_memory(
    group: RestoreGroup,
    snapshot: MemorySnapshot,
    memory: WorkerMemory,
    target: RestoreTarget,
    environ: Mapping[str, str],
) -> dict[str, float]:
    """Load the snapshot into the target; return the seconds by stage. Collective; raises as `all_or_none` does.

    Its digests were verified when it was chosen.
    """
    stages = StageTimer()
    folders = {seal.part: path for path, seal in memory.snapshots() if seal.state == snapshot.state}
    if snapshot.replicated:
        _load_replicated(group, snapshot, folders, target)
    else:
        with Scratch.with_room(0, environ) as scratch:
            _load_parts(group, snapshot, folders, target, scratch.path)
    stages.done("recall")
    return stages.seconds


def _load_replicated(
    group: RestoreGroup, snapshot: MemorySnapshot, folders: Mapping[int, Path], target: RestoreTarget
) -> None:
    """Have each process read its own copy if every worker has one; else one reads and broadcasts."""
    source = snapshot.holders[0][0]
    reads = snapshot.everywhere or group.ranks.rank == source
    content = group.all_or_none(lambda: (folders[0] / METADATA).read_bytes() if reads else b"")
    if not snapshot.everywhere:
        content = group.collectives.broadcast_object(content, source)
    loading = group.all_or_none(lambda: target.plan(read_metadata(content), group.key))
    group.all_or_none(lambda: loading.load(folders[0]) if reads else None)
    if not snapshot.everywhere:
        broadcast_tensors(target.tensors(), source)


def _load_parts(
    group: RestoreGroup,
    snapshot: MemorySnapshot,
    folders: Mapping[int, Path],
    target: RestoreTarget,
    scratch: Path,
) -> None:
    """Have each process read its shards from all parts; parts missing on its worker are sent by one that has them."""
    rank = group.ranks.rank
    published = [part for part in folders if snapshot.holders[part][0] == rank]
    read = group.all_or_none(lambda: {part: (folders[part] / METADATA).read_bytes() for part in published})
    contents: dict[int, bytes] = {}
    for others in group.collectives.all_gather_object(read):
        contents.update(others)
    metadata = group.all_or_none(
        lambda: merge_metadata({_name(part): read_metadata(contents[part]) for part in sorted(contents)})
    )
    loading = group.all_or_none(lambda: target.plan(metadata, group.key))
    for part, folder in folders.items():
        (scratch / _name(part)).symlink_to(folder)
    wanted = group.collectives.all_gather_object(frozenset(loading.files))
    holders = {name: snapshot.ranks_with(_part(name)) for name in frozenset[str]().union(*wanted)}
    exchange_files(wanted, holders, lambda name: scratch / name)
    group.all_or_none(lambda: loading.load(scratch))


def _name(part: int) -> str:
    return f"part-{part}"


def _part(file: str) -> int:
    return int(file.split("/")[0].removeprefix("part-"))
