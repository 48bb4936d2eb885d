"""Choice of the checkpoint that a new generation resumes from, and what it inherits. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from pretrain_api.checkpoint.lineage import Manifest, StepRange, data_step, merged
from pretrain_store.errors import AllCheckpointsCorrupt
from pretrain_store.lineage import (
    Interventions,
    Listing,
    chain_of,
    checkpoint_chain,
    known_corrupt,
    latest_interventions,
    place_of,
    rolled_back,
)


@dataclass(frozen=True)
class ParentChoice:
    """Parent of a new generation and the checkpoints it rejects, both for its record. A null parent: from scratch."""

    parent: str | None
    rejected: tuple[str, ...]


def choose_parent(listing: Listing, rejected: Collection[str]) -> ParentChoice:
    """Choose the newest checkpoint of the chain that is not rejected; else the newest one of any lower generation.

    The parent is null only when rollbacks left behind every manifest of the prefix. Raises AllCheckpointsCorrupt when
    all others are rejected.
    """
    refused = known_corrupt(listing) | frozenset(rejected)
    named = tuple(sorted(refused & listing.manifests | frozenset(rejected)))
    left = listing.manifests - rolled_back(listing)
    if not left:
        return ParentChoice(parent=None, rejected=named)
    for key in _candidates(listing):
        if key in left and key not in refused:
            return ParentChoice(parent=key, rejected=named)
    raise AllCheckpointsCorrupt(named)


def choose_rollback(listing: Listing, before: int, rejected: Collection[str] = ()) -> ParentChoice:
    """Choose the rollback target: the newest usable checkpoint of the chain of a step below `before`; null: step 0.

    An earlier rollback's target may be where the trouble comes from, so the one before it is preferred.
    """
    corrupt = known_corrupt(listing) | frozenset(rejected)
    refused = corrupt | rolled_back(listing)
    usable = [key for key in checkpoint_chain(listing) if key not in refused and place_of(key)[1] < before]
    steps_tried = {rollback.to_step for rollback in latest_interventions(listing).rollbacks}
    fresh = [key for key in usable if place_of(key)[1] not in steps_tried]
    return ParentChoice(next(iter(fresh or usable), None), tuple(sorted(corrupt & listing.manifests)))


def inherited_interventions(listing: Listing, parent: Manifest | None) -> Interventions:
    """Return the interventions of a generation with this parent. Data that the parent trained on is not skipped."""
    newest = latest_interventions(listing)
    before = parent.skipped if parent is not None else ()
    trained = data_step(parent.step, before) if parent is not None else 0
    ahead = (
        StepRange(first=max(item.first, trained + 1), last=item.last) for item in newest.skipped if item.last > trained
    )
    slowed = parent.slowed if parent is not None else ()
    return Interventions(
        skipped=merged((*before, *ahead)),
        slowed=(*newest.slowed, *(item for item in slowed if item not in newest.slowed)),
        rollbacks=newest.rollbacks,
    )


def _candidates(listing: Listing) -> Iterator[str]:
    """Yield every checkpoint, best first: the chain, then the chain without the highest record, and so on."""
    for number in sorted({*listing.records, *listing.unreadable}, reverse=True):
        yield from chain_of(listing, number).keys
    yield from sorted(listing.manifests, key=place_of, reverse=True)
