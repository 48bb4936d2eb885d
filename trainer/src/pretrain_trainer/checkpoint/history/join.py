"""Joint claim of a generation's ranks when workers keep snapshots: the ranks agree on the snapshot to resume from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pretrain_api.checkpoint.lineage import LineageRecord, MemoryState
from pretrain_store.port import ObjectStore
from pretrain_trainer.checkpoint.history.claim import (
    GenerationClaim,
    LineageEntry,
    ResumePoint,
    find_resume_point,
    put_claim,
)
from pretrain_trainer.checkpoint.memory.plan import (
    MemoryInventory,
    MemorySnapshot,
    WorkerMemory,
    choose_snapshot,
    find_damaged,
)
from pretrain_trainer.core.collectives import Collectives
from pretrain_trainer.core.store_errors import SharedError


def claim_with_memory(
    store: ObjectStore | None, claim: GenerationClaim, look: Callable[[], None], memory: WorkerMemory
) -> LineageEntry | SharedError | None:
    """Claim the generation as `claim_generation` does, from a verified snapshot if there is one. Collective.

    All ranks report their workers' snapshots and verify the chosen one, before rank 0 puts the record. `store` is
    given on rank 0 only, which returns the result for all.
    """
    collectives = Collectives(None)
    inventories = _inventories(collectives, memory)
    found = find_resume_point(store, claim, look) if store is not None else None
    snapshot: MemorySnapshot | None = None
    if any(inventory.seals for inventory in inventories):
        allowed = collectives.broadcast_object(_allowed(found, claim, inventories))
        snapshot = _verified_snapshot(collectives, memory, inventories, allowed.__contains__)
    if store is None or not isinstance(found, ResumePoint):
        return found if isinstance(found, SharedError) else None
    return put_claim(store, claim, found, snapshot)


def own_snapshot_before(step: int, record: LineageRecord, memory: WorkerMemory) -> MemorySnapshot | None:
    """Return the newest whole snapshot of the record's generation from before this step was done. Collective."""

    def allowed(state: MemoryState) -> bool:
        return state.step < step and (state.generation, state.nonce) == (record.generation, record.nonce)

    collectives = Collectives(None)
    return _verified_snapshot(collectives, memory, _inventories(collectives, memory), allowed)


def _inventories(collectives: Collectives, memory: WorkerMemory) -> list[MemoryInventory]:
    seals = tuple(seal for _, seal in memory.snapshots()) if memory.reports else ()
    return collectives.all_gather_object(MemoryInventory(memory.first, seals))


def _verified_snapshot(
    collectives: Collectives,
    memory: WorkerMemory,
    inventories: Sequence[MemoryInventory],
    allowed: Callable[[MemoryState], bool],
) -> MemorySnapshot | None:
    """Return the newest allowed snapshot, if its files match their digests."""
    snapshot = choose_snapshot(inventories, allowed)
    if snapshot is None:
        return None
    damaged = collectives.all_gather_object(find_damaged(memory, snapshot))
    return snapshot.without(pair for pairs in damaged for pair in pairs)


def _allowed(
    found: ResumePoint | SharedError | None, claim: GenerationClaim, inventories: Sequence[MemoryInventory]
) -> tuple[MemoryState, ...]:
    if not isinstance(found, ResumePoint):
        return ()
    states = (seal.state for inventory in inventories for seal in inventory.seals)
    return tuple(state for state in states if found.allows(claim.job_uid, state))
