"""Division of a step's micro-batches among ranks: contiguous, whole, as even as possible."""

from __future__ import annotations


def share(total: int, rank: int, world_size: int) -> range:
    """Return this rank's micro-batches of 0..total-1; the first ranks may have one more."""
    base, more = divmod(total, world_size)
    first = rank * base + min(rank, more)
    return range(first, first + base + (rank < more))


def largest_share(total: int, world_size: int) -> int:
    """Return the most micro-batches of any rank: with collectives in forward and backward, all ranks run as many."""
    return -(-total // world_size)
