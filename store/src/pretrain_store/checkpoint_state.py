"""What each checkpoint of a prefix is worth, for people: by the rules of `lineage`, over a listing. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from pretrain_store.errors import NoUsableCheckpoint
from pretrain_store.lineage import Listing, choose_parent, found_corrupt, given_up, line


class Standing(StrEnum):
    """Of a checkpoint in the history. Whether its bytes are what was saved is another question: see `verify`."""

    IN_FORCE = "in force"
    """Where the next generation goes on from."""
    ON_LINE = "on the line"
    REJECTED = "damaged"
    """A generation found it so and passed over it."""
    GIVEN_UP = "rolled back"
    """A rollback went back to before it."""
    ASIDE = "off the line"
    """History went on without it: a generation that was replaced committed it, or what came before is gone."""


def standings(listing: Listing) -> Mapping[str, Standing]:
    """The standing of every manifest in the listing."""
    on_line, damaged, left = frozenset(line(listing)), found_corrupt(listing), given_up(listing)
    try:
        in_force = choose_parent(listing, ()).parent
    except NoUsableCheckpoint:
        in_force = None

    def of(key: str) -> Standing:
        if key == in_force:
            return Standing.IN_FORCE
        if key in damaged:
            return Standing.REJECTED
        if key in left:
            return Standing.GIVEN_UP
        return Standing.ON_LINE if key in on_line else Standing.ASIDE

    return {key: of(key) for key in listing.manifests}
