"""Parallel map over files in threads: digests, copies and I/O release the interpreter lock."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(act: Callable[[Item], Result], items: Collection[Item], at_once: int) -> list[Result]:
    """Return the results of `act`, in the order of the items; re-raise its errors. One at a time starts no thread."""
    if min(at_once, len(items)) <= 1:
        return [act(item) for item in items]
    with ThreadPoolExecutor(max_workers=at_once) as threads:
        return list(threads.map(act, items))
