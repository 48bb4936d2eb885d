"""State of each checkpoint of a prefix, by the rules of `lineage`, for listings. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from pretrain_store.errors import AllCheckpointsCorrupt
from pretrain_store.lineage import Listing, checkpoint_chain, known_corrupt, rolled_back
from pretrain_store.parent import choose_parent


class CheckpointState(StrEnum):
    """State of a checkpoint in the lineage. `verify` checks its bytes. Programs read the values from `--json`."""

    IN_FORCE = "in force"
    """The next generation resumes from it."""
    ON_LINE = "on the line"
    """It is in the checkpoint lineage, before the current one."""
    REJECTED = "damaged"
    """A generation found it corrupt and skipped it."""
    GIVEN_UP = "rolled back"
    """A rollback returned to a step before it."""
    ASIDE = "off the line"
    """It is not in the lineage: a replaced generation committed it, or the checkpoints before it are gone."""


def checkpoint_states(listing: Listing) -> Mapping[str, CheckpointState]:
    """Return the state of every manifest in the listing."""
    chain, corrupt, left = frozenset(checkpoint_chain(listing)), known_corrupt(listing), rolled_back(listing)
    try:
        current = choose_parent(listing, ()).parent
    except AllCheckpointsCorrupt:
        current = None

    def of(key: str) -> CheckpointState:
        if key == current:
            return CheckpointState.IN_FORCE
        if key in corrupt:
            return CheckpointState.REJECTED
        if key in left:
            return CheckpointState.GIVEN_UP
        return CheckpointState.ON_LINE if key in chain else CheckpointState.ASIDE

    return {key: of(key) for key in listing.manifests}
