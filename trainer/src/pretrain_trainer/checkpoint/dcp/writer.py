"""Writing a process's shards through DCP's planner and writer, in files of about equal size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pretrain_trainer.checkpoint.dcp.archive import ALIGNMENT

FILE_BYTES = 256 << 20
"""Target size of a file; a larger tensor has a file of its own."""


class LivePlanner(DefaultSavePlanner):
    """Planner that plans by the live tensors and writes their copies."""

    def __init__(self, tensors: Mapping[str, Tensor], copies: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors = dict(tensors)
        self._copies = copies

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """See DefaultSavePlanner."""
        super().set_up_planner(self._tensors, storage_meta, is_coordinator)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """See DefaultSavePlanner. Each copy is written once, and its memory freed."""
        return self._copies.pop(index.fqn)


class PartPlanner(LivePlanner):
    """Planner of one process's part as if it were the whole, which DCP's own check of completeness would refuse."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """See DefaultSavePlanner."""
        self.global_plan, self.metadata = create_default_global_save_plan(all_plans)
        return self.global_plan, self.metadata


def write(folder: Path, planner: LivePlanner, group: dist.ProcessGroup | None) -> Metadata:
    """Write the planner's tensors to `folder`; collective over `group`, if there is one."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # writing without a group is intended
    return save(
        {},  # the planner has the tensors: DCP would wrap and log each
        storage_writer=_Writer(folder),
        planner=planner,
        process_group=group,
        no_dist=group is None,
    )


def file_prefix(rank: int) -> str:
    """Return the prefix of a rank's files, as DCP's writer plans them."""
    return f"__{rank}_"


class _Writer(FileSystemWriter):
    """Writer of a process's own files, with aligned archives; the metadata names no folder of this machine."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=False)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_divide(plan.items)):
            name = f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}"
            with (Path(self.path) / name).open("wb") as file:
                results += [_write_item(file, name, item, planner) for item in items]
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written


def _divide(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    """Divide the items, in order, into as few files of about equal size as FILE_BYTES allows."""
    total = sum(_bytes(item) for item in items)
    count = max(1, -(-total // FILE_BYTES))
    parts: list[list[WriteItem]] = [[] for _ in range(count)]
    done = 0
    for item in items:
        parts[min(done * count // max(total, 1), count - 1)].append(item)
        done += _bytes(item)
    return [part for part in parts if part]


def _bytes(item: WriteItem) -> int:
    described = item.tensor_data
    assert described is not None  # only tensors are saved
    return math.prod(described.chunk.sizes) * described.properties.dtype.itemsize


def _write_item(file: BinaryIO, name: str, item: WriteItem, planner: SavePlanner) -> WriteResult:
    file.write(bytes(-file.tell() % ALIGNMENT))
    start = file.tell()
    torch.save(planner.resolve_data(item), file)
    length = file.tell() - start
    return WriteResult(item.index, length, _StorageInfo(name, start, length))
