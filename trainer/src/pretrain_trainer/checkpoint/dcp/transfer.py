"""State and files on their way from the ranks that read them to the others. All functions are collective."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain_trainer.checkpoint.dcp.layout import local

_BUCKET = 64 << 20
"""Tensors smaller than this travel together, up to so many bytes."""
_PIECE = 256 << 20
"""Files travel in pieces of so many bytes."""


def broadcast(tensors: Mapping[str, Tensor], source: int) -> None:
    """Copy what rank `source` has of the tensors over what others have, in the same layout and under the same names."""
    if dist.get_world_size() == 1:
        return  # packing the tensors alone copies all of them
    for bucket in _buckets(local(tensor) for tensor in tensors.values()):
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
    """Tensors of one dtype and device, up to _BUCKET bytes together; a larger one is alone."""
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


def exchange(
    wanted: Sequence[frozenset[str]], holders: Mapping[str, Sequence[int]], place: Callable[[str], Path]
) -> None:
    """Give every rank the files that it wants, `wanted` by rank: those who hold one send it to those who do not.

    `place` is where a file is, or has to be, on this rank. Each file is sent by its holders in turn.
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
