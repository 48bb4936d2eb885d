"""Small collectives on Python objects; free of cost in a world of one process."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


class Collectives:
    """Collectives that every process of `group` (None: of the default group) calls alike. Objects travel as pickles."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._size = dist.get_world_size(group)

    def broadcast_object(self, value: Value, source: int = 0) -> Value:
        """Return on all ranks the value of rank `source`."""
        if self._size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=source, group=self._group)
        return values[0]

    def all_gather_object(self, value: Value) -> list[Value]:
        """Return on all ranks the values of all ranks, by rank."""
        if self._size == 1:
            return [value]
        values = [value] * self._size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def all_reduce_max(self, number: int) -> int:
        """Return on all ranks the greatest number of any rank: ten times cheaper than exchanging objects."""
        if self._size == 1:
            return number
        highest = torch.tensor([number])
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._group)
        return int(highest)
