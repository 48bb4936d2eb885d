"""Retention: which checkpoints of a prefix the newest generation may delete. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain_api.spec.job import Retain
from pretrain_store.lineage import Listing, chain_of, known_corrupt, place_of, rolled_back

KEEP_AT_LEAST = 2
"""The newest one may turn out to be corrupt."""


@dataclass(frozen=True)
class Deletion:
    """Manifest keys of the checkpoints that the owner of `generation` may delete, oldest first."""

    generation: int
    checkpoints: tuple[str, ...]


def plan_retention(listing: Listing, generation: int, retain: Retain) -> Deletion:
    """Plan the deletions of the owner of `generation`: none unless its record is the highest.

    Of the chain these stay: the newest `retain.last`, at least two; multiples of `everySteps`; pinned steps; the parent
    of the highest record. Earlier generations' checkpoints outside the chain, and rejected ones, are deleted once the
    chain has two usable ones: until then they may be the last resort.
    """
    if listing.highest != generation or generation not in listing.records:
        return Deletion(generation, ())
    chain = chain_of(listing, generation)
    refused = known_corrupt(listing) | rolled_back(listing)
    usable = [key for key in chain.keys if key not in refused]
    if len(usable) < KEEP_AT_LEAST:
        return Deletion(generation, ())
    kept = {
        *usable[: max(KEEP_AT_LEAST, retain.last)],
        *(key for key in usable if retain.every_steps and place_of(key)[1] % retain.every_steps == 0),
        *(key for key in usable if place_of(key)[1] in retain.pin),
        listing.records[generation].parent,
    }
    outside = {
        key
        for key in listing.manifests - set(usable)
        if chain.reached <= place_of(key)[0] < generation
    }  # fmt: skip
    return Deletion(generation, tuple(sorted((set(usable) | outside) - kept, key=place_of)))
