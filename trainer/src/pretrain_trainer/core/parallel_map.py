"""Doing the same with several files at once: digests, copies and input release the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(act: Callable[[Item], Result], items: Collection[Item], at_once: int) -> list[Result]:
    """What `act` returns for each item, in order; raises what it raises. One at a time takes no thread."""
    if min(at_once, len(items)) <= 1:
        return [act(item) for item in items]
    with ThreadPoolExecutor(max_workers=at_once) as threads:
        return list(threads.map(act, items))
