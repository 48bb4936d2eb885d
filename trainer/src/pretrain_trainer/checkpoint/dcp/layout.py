"""The files that a process saves: laid out by DCP once, then rewritten in place at every save.

DCP's plan and its files (one `torch.save` archive for each tensor, so that any DCP reader opens it) depend on names,
shapes and dtypes only, and those do not change while a job runs. Making both anew costs 0.2 ms of Python for each
tensor, 55 ms a save for a small model, in a thread that takes its time from the step loop. So DCP makes them once; from
then on a save copies each tensor to its place in the mapped files, which are staging buffer and upload in one: pinned
where it comes from a GPU. Checksums inside the archives go stale by that: torch does not read them, and every object
has a sha256 in the manifest.

There are several files where there is much to save, so that they can be digested, written, fetched and verified beside
one another: a core digests less than a disk reads.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import SEEK_CUR, SEEK_END, SEEK_SET, BytesIO, IOBase, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view
from torch.distributed.tensor import DTensor
from torch.futures import Future

from pretrain_trainer.checkpoint.dcp.pinned_memory import CUDA, Pinned, Runtime, gpus

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

METADATA = ".metadata"
ALIGNMENT = 64
"""Bytes, of each tensor in its file."""
FILE_BYTES = 256 << 20
"""About so large a file becomes, unless a single tensor is larger."""
_SMALL = 1 << 20
"""Archives up to this size are read whole to look into them: a view costs 25 calls of Python each."""


@dataclass(frozen=True)
class Signature:
    """What a layout depends on: name, global shape and dtype of every tensor."""

    tensors: tuple[tuple[str, torch.Size, torch.dtype], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Signature:
        """The signature of these tensors."""
        return cls(tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()))


@dataclass(frozen=True)
class Layout:
    """The files of one process in `folder`, and for each tensor that it saves its place in a mapped file."""

    signature: Signature
    folder: Path
    files: tuple[str, ...]
    places: Mapping[str, Tensor]
    pinned: tuple[Pinned, ...] = ()

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors to their places: all that a save makes the step loop wait for."""
        copy([local(tensors[name]) for name in self.places], list(self.places.values()))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy(sources: list[Tensor], targets: list[Tensor], runtime: Runtime = CUDA) -> None:
    """Copy tensors over others of the same shapes and dtypes, at once: 5 us each instead of 15.

    To and from GPUs all copies are queued, and then waited for together.
    """
    if not targets:
        return
    devices = gpus((*sources, *targets))
    with torch.no_grad():
        torch._foreach_copy_(targets, sources, non_blocking=bool(devices))  # pyright: ignore[reportPrivateImportUsage]
    for device in devices:
        runtime.wait(device)


def staged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies of this process's parts in CPU memory, for the first save, when there is no layout yet."""
    copies = {
        name: torch.empty(local(tensor).shape, dtype=tensor.dtype, device="cpu") for name, tensor in tensors.items()
    }
    copy([local(tensor) for tensor in tensors.values()], list(copies.values()))
    return copies


def lay_out(
    folder: Path, tensors: Mapping[str, Tensor], copies: dict[str, Tensor], group: dist.ProcessGroup | None
) -> Layout:
    """Have DCP write `copies`, whose geometry is that of `tensors`, to `folder`, using them up; map the files.

    Collective over `group`, whose processes each write their shards; without one this process writes everything.
    `tensors` may be in use meanwhile: only shapes are read.
    """
    return _lay_out(folder, tensors, copies, group, _Planner(tensors, copies))


def lay_out_part(folder: Path, tensors: Mapping[str, Tensor], copies: dict[str, Tensor]) -> Layout:
    """The same for this process's own part, without the others: its metadata tells of nothing else."""
    return _lay_out(folder, tensors, copies, None, _PartPlanner(tensors, copies))


def _lay_out(
    folder: Path,
    tensors: Mapping[str, Tensor],
    copies: dict[str, Tensor],
    group: dist.ProcessGroup | None,
    planner: _Planner,
) -> Layout:
    likes = {name: torch.empty_like(copy, device="meta") for name, copy in copies.items()}
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # without a group that is what is meant
    metadata = save(
        {},  # the planner has them: DCP would wrap and log each
        storage_writer=_Writer(folder),
        planner=planner,
        process_group=group,
        no_dist=group is None,
    )
    rank = dist.get_rank(group) if group is not None else 0
    stored: Mapping[MetadataIndex, _StorageInfo] = metadata.storage_data
    mine: dict[str, dict[str, _StorageInfo]] = {}
    for index, info in stored.items():
        if info.relative_path.startswith(_prefix(rank)):
            mine.setdefault(info.relative_path, {})[index.fqn] = info
    mapped = {name: _mapped(folder / name) for name in mine}
    places: dict[str, Tensor] = {}
    for name, infos in mine.items():
        places |= _places(folder / name, mapped[name], infos, likes)
    from_gpu = bool(gpus(local(tensor) for tensor in tensors.values()))
    return Layout(
        signature=Signature.of(tensors),
        folder=folder,
        files=(*sorted(mine), *((METADATA,) if rank == 0 else ())),
        places=places,
        pinned=tuple(Pinned(content) for content in mapped.values()) if from_gpu else (),
    )


class Bytes(RawIOBase):
    """Memory as a file, without a copy of it."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._at = 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be."""
        return True

    def tell(self) -> int:
        """Where the next byte is."""
        return self._at

    def seek(self, offset: int, whence: int = SEEK_SET, /) -> int:
        """Go there; beyond the end there is nothing."""
        begin = {SEEK_SET: 0, SEEK_CUR: self._at, SEEK_END: len(self._content)}[whence]
        self._at = max(0, begin + offset)
        return self._at

    def readinto(self, into: WriteableBuffer, /) -> int:
        """The next bytes; how many they are."""
        target = memoryview(into)
        found = self._content[self._at : self._at + len(target)]
        target[: len(found)] = found
        self._at += len(found)
        return len(found)

    def close(self) -> None:
        """Let go of the memory."""
        self._content.release()
        super().close()


def data_offset(file: BinaryIO | Bytes, info: _StorageInfo) -> int:
    """Where in the file the bytes of the tensor in one of its `torch.save` archives begin. Nothing is unpickled."""
    archive: Any = torch._C.PyTorchFileReader
    view: object = _create_file_view(cast("IOBase", file), info.offset, info.length)
    if info.length <= _SMALL:
        file.seek(info.offset)
        view = BytesIO(file.read(info.length))
    return info.offset + archive(view).get_record_offset("data/0")


class _Planner(DefaultSavePlanner):
    """Plans by the live tensors, writes their copies."""

    def __init__(self, tensors: Mapping[str, Tensor], copies: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors = dict(tensors)
        self._copies = copies

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(self._tensors, storage_meta, is_coordinator)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._copies.pop(index.fqn)  # it is written once: then its memory is free


class _PartPlanner(_Planner):
    """Plans one process's part as if it were all, which DCP's own check of completeness would refuse."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        self.global_plan, self.metadata = create_default_global_save_plan(all_plans)
        return self.global_plan, self.metadata


class _Writer(FileSystemWriter):
    """A process's own files, their archives aligned; the metadata names no folder of this machine."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=False)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_shared_out(plan.items)):
            name = f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}"
            with (Path(self.path) / name).open("wb") as file:
                results += [_write(file, name, item, planner) for item in items]
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written


def _shared_out(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    """In order, as few files of about the same size as are needed to keep to FILE_BYTES."""
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
    assert described is not None  # tensors are all that is saved
    return math.prod(described.chunk.sizes) * described.properties.dtype.itemsize


def _write(file: BinaryIO, name: str, item: WriteItem, planner: SavePlanner) -> WriteResult:
    file.write(bytes(-file.tell() % ALIGNMENT))
    start = file.tell()
    torch.save(planner.resolve_data(item), file)
    length = file.tell() - start
    return WriteResult(item.index, length, _StorageInfo(name, start, length))


def _prefix(rank: int) -> str:
    """As DCP's writer has it in its plans."""
    return f"__{rank}_"


def _mapped(path: Path) -> Tensor:
    """A file's bytes: writing to them changes the file.

    Each page is touched here, in the background: else the step loop's first copy would meet a fault at each of them.
    """
    with path.open("r+b") as file:
        content = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
    content[:: mmap.PAGESIZE].add_(0)
    return content


def _places(
    path: Path, content: Tensor, stored: Mapping[str, _StorageInfo], likes: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """For each tensor in the file a view of its bytes there."""
    with path.open("rb") as file:
        return {
            name: _view(content, data_offset(file, info), likes[name])
            for name, info in stored.items()
            if likes[name].numel()
        }


def _view(content: Tensor, offset: int, like: Tensor) -> Tensor:
    return content[offset : offset + like.nbytes].view(like.dtype).view(like.shape)
