"""Loading a state from the memory of workers: from one's own where it is, else from those who have it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pretrain_sdk.scratch import Scratch
from pretrain_trainer.checkpoint.collective import Together
from pretrain_trainer.checkpoint.dcp.layout import METADATA
from pretrain_trainer.checkpoint.dcp.load import merged, read_metadata
from pretrain_trainer.checkpoint.dcp.target import Target
from pretrain_trainer.checkpoint.dcp.transfer import broadcast, exchange
from pretrain_trainer.checkpoint.memory.plan import Recall, Worker
from pretrain_trainer.core.stage_timer import StageTimer


def recall_state(
    together: Together, recall: Recall, worker: Worker, target: Target, environ: Mapping[str, str]
) -> dict[str, float]:
    """Load the state into the target; returns the seconds by stage. Collective; raises as `all_or_none` does.

    Its digests were checked when it was chosen.
    """
    stages = StageTimer()
    folders = {seal.part: path for path, seal in worker.found() if seal.state == recall.state}
    if recall.replicated:
        _load_replicated(together, recall, folders, target)
    else:
        with Scratch.with_room(0, environ) as scratch:
            _load_parts(together, recall, folders, target, scratch.path)
    stages.done("recall")
    return stages.seconds


def _load_replicated(together: Together, recall: Recall, folders: Mapping[int, Path], target: Target) -> None:
    """Where every worker has it each process reads its own; else one reads, and broadcasts."""
    source = recall.holders[0][0]
    reads = recall.everywhere or together.ranks.rank == source
    content = together.all_or_none(lambda: (folders[0] / METADATA).read_bytes() if reads else b"")
    if not recall.everywhere:
        content = together.collectives.broadcast_object(content, source)
    loading = together.all_or_none(lambda: target.plan(read_metadata(content), together.key))
    together.all_or_none(lambda: loading.load(folders[0]) if reads else None)
    if not recall.everywhere:
        broadcast(target.tensors(), source)


def _load_parts(together: Together, recall: Recall, folders: Mapping[int, Path], target: Target, scratch: Path) -> None:
    """Each process takes what it wants of all parts; what is not on its worker is sent by one that has it."""
    rank = together.ranks.rank
    speaks = [part for part in folders if recall.holders[part][0] == rank]
    read = together.all_or_none(lambda: {part: (folders[part] / METADATA).read_bytes() for part in speaks})
    said: dict[int, bytes] = {}
    for contents in together.collectives.all_gather_object(read):
        said.update(contents)
    metadata = together.all_or_none(lambda: merged({_name(part): read_metadata(said[part]) for part in sorted(said)}))
    loading = together.all_or_none(lambda: target.plan(metadata, together.key))
    for part, folder in folders.items():
        (scratch / _name(part)).symlink_to(folder)
    wanted = together.collectives.all_gather_object(frozenset(loading.files))
    holders = {name: recall.ranks_with(_part(name)) for name in frozenset[str]().union(*wanted)}
    exchange(wanted, holders, lambda name: scratch / name)
    together.all_or_none(lambda: loading.load(scratch))


def _name(part: int) -> str:
    return f"part-{part}"


def _part(file: str) -> int:
    return int(file.split("/")[0].removeprefix("part-"))
