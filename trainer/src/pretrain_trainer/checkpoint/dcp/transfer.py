"""Transfer of state and files from the ranks that read them to the others. All functions are collective."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain_trainer.checkpoint.dcp.layout import local_part

_BUCKET = 64 << 20
"""Bytes of a bucket, in which smaller tensors are sent together."""
_PIECE = 256 << 20
"""Bytes of the pieces in which files are sent."""


def broadcast_tensors(tensors: Mapping[str, Tensor], source: int) -> None:
    """Broadcast the tensors of rank `source` to the other ranks, which have them with the same layout and names."""
    if dist.get_world_size() == 1:
        return  # packing the tensors would copy all of them for nothing
    for bucket in _buckets(local_part(tensor) for tensor in tensors.values()):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.broadcast(bucket[0], src=source)
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.broadcast(flat, src=source)
        if dist.get_rank() != source:
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors of one dtype and device, up to _BUCKET bytes together; a larger one is alone."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    sizes: Counter[tuple[torch.dtype, torch.device]] = Counter()
    for tensor in tensors:
        key = (tensor.dtype, tensor.device)
        if key in alike and sizes[key] + tensor.nbytes > _BUCKET:
            yield alike.pop(key)
            sizes[key] = 0
        alike.setdefault(key, []).append(tensor)
        sizes[key] += tensor.nbytes
    yield from alike.values()


def exchange_files(
    wanted: Sequence[frozenset[str]], holders: Mapping[str, Sequence[int]], place: Callable[[str], Path]
) -> None:
    """Send every rank the files that it wants and lacks; `wanted` is by rank, `holders` by file.

    `place` returns the path of a file on this rank. The holders of a file take turns in sending it.
    """
    me = dist.get_rank()
    for name in sorted(frozenset().union(*wanted)):
        there = holders[name]
        without = [rank for rank, names in enumerate(wanted) if name in names and rank not in there]
        for turn, receiver in enumerate(without):
            sender = there[turn % len(there)]
            if me == sender:
                _send(place(name), receiver)
            elif me == receiver:
                _receive(place(name), sender)


def _send(path: Path, receiver: int) -> None:
    size = path.stat().st_size
    dist.send(torch.tensor([size]), dst=receiver)
    if size:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # copy: torch warns of read-only buffers
            for piece in torch.frombuffer(content, dtype=torch.uint8).split(_PIECE):
                dist.send(piece, dst=receiver)


def _receive(path: Path, sender: int) -> None:
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, src=sender)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w+b") as file:
        file.truncate(int(size))
        if int(size):
            content = mmap.mmap(file.fileno(), 0)
            for piece in torch.frombuffer(content, dtype=torch.uint8).split(_PIECE):
                dist.recv(piece, src=sender)
