"""Who computes which micro-batches: contiguous whole ones, as evenly as possible."""

from __future__ import annotations


def share(total: int, rank: int, world_size: int) -> range:
    """The micro-batches of this rank among 0..total-1, as even as can be: the first ranks may have one more."""
    base, more = divmod(total, world_size)
    first = rank * base + min(rank, more)
    return range(first, first + base + (rank < more))


def largest_share(total: int, world_size: int) -> int:
    """Micro-batches of the ranks that have most: where collectives run in forward and backward, all run so many."""
    return -(-total // world_size)
