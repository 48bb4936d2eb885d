"""What ranks tell each other: small collectives, which cost nothing where there is one process."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


class Agreement:
    """Collectives that every process of `group` (None: of all) calls alike. Objects travel as pickles between ranks."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._size = dist.get_world_size(group)

    def first_says(self, value: Value) -> Value:
        """What rank 0 passes, on all ranks."""
        return self.says(value, 0)

    def says(self, value: Value, rank: int) -> Value:
        """What this rank passes, on all ranks."""
        if self._size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=rank, group=self._group)
        return values[0]

    def all_say(self, value: Value) -> list[Value]:
        """What each rank passes, by rank, on all ranks."""
        if self._size == 1:
            return [value]
        values = [value] * self._size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def highest(self, code: int) -> int:
        """The greatest code that any rank passes: ten times cheaper than exchanging objects."""
        if self._size == 1:
            return code
        highest = torch.tensor([code])
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._group)
        return int(highest)
