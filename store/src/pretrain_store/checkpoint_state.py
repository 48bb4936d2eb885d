"""State of each checkpoint of a prefix, by the rules of `lineage`, for listings. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from pretrain_store.errors import AllCheckpointsCorrupt
from pretrain_store.lineage import Listing, checkpoint_chain, known_corrupt, rolled_back
from pretrain_store.parent import choose_parent


class CheckpointState(StrEnum):
    """State of a checkpoint in the lineage. `verify` checks its bytes. Programs read the values from `--json`."""

    CURRENT = "current"
    """The next generation resumes from it."""
    IN_LINEAGE = "in lineage"
    """It is in the checkpoint lineage, before the current one."""
    REJECTED = "damaged"
    """A generation found it corrupt and skipped it."""
    GIVEN_UP = "rolled back"
    """A rollback returned to a step before it."""
    NOT_IN_LINEAGE = "not in lineage"
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
            return CheckpointState.CURRENT
        if key in corrupt:
            return CheckpointState.REJECTED
        if key in left:
            return CheckpointState.GIVEN_UP
        return CheckpointState.IN_LINEAGE if key in chain else CheckpointState.NOT_IN_LINEAGE

    return {key: of(key) for key in listing.manifests}
