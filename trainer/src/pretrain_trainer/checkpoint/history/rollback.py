"""Rollback of a diverged generation: it claims the next number of the lineage by itself.

No coordinator assigns the number: it is one above the highest in the lineage, and the record is put if the number is
free. Another claimant of the same number finds it taken, takes a higher one, and resumes from there.
"""

from __future__ import annotations

import uuid

from pretrain_api.checkpoint.lineage import LineageRecord, Manifest, Rollback, merged
from pretrain_store.errors import CheckpointCorrupt, GenerationTaken, HistoryError, StoreError
from pretrain_store.history import put_record, read_listing, read_manifest
from pretrain_store.lineage import Listing, later_record, refuse_foreign_job
from pretrain_store.parent import ParentChoice, choose_rollback, inherited_interventions
from pretrain_store.port import ObjectStore
from pretrain_trainer.checkpoint.history.claim import LineageEntry, timestamp
from pretrain_trainer.checkpoint.memory.plan import MemorySnapshot
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.store_errors import SharedError, shared_error
from pretrain_trainer.stability.guard import RollbackRequest

REASON = "RolledBack"
"""Reason in the record of a rollback, in place of a generation's reason."""


class RollbackClaim:
    """Rank 0's claim of one rollback. It may be retried after an obstacle: the record keeps its nonce.

    `snapshot`: the newest snapshot of the diverged generation from before the trouble.
    """

    def __init__(
        self, store: ObjectStore, holder: LineageRecord, request: RollbackRequest, snapshot: MemorySnapshot | None
    ) -> None:
        self._store = store
        self._holder = holder
        self._request = request
        self._snapshot = snapshot
        self._entry: LineageEntry | None = None

    def enter(self) -> LineageEntry | SharedError:
        """Put the record, whose parent is the newest checkpoint before the trouble; a later snapshot is preferred."""
        try:
            if self._entry is None:
                self._entry = self._planned()
            put_record(self._store, self._entry.record)
        except (StoreError, HistoryError) as error:
            return shared_error(error)
        return self._entry

    def _planned(self) -> LineageEntry:
        listing = read_listing(self._store)
        if later_record(listing, self._holder.generation) is not None:
            refuse_foreign_job(listing, self._holder.job_uid, may_take_over=False)
            raise GenerationTaken(listing.highest)
        choice, parent = self._choose(listing)
        target = TrainingProgress.of(parent) if parent is not None else TrainingProgress()
        snapshot = self._snapshot if self._prefers_snapshot(target.step) else None
        if snapshot is not None:
            target = snapshot.progress
        rollback = self._rollback(listing.highest + 1, target)
        inherited = inherited_interventions(listing, parent)
        record = LineageRecord(
            generation=rollback.generation,
            nonce=uuid.uuid4().hex,
            job_uid=self._holder.job_uid,
            parent=choice.parent,
            world_size=self._holder.world_size,
            skipped=merged((*inherited.skipped, *([rollback.skipped] if rollback.skipped else []))),
            slowed=(*inherited.slowed, *([rollback.slowed] if rollback.slowed else [])),
            rollbacks=(*inherited.rollbacks, rollback),
            rejected=choice.rejected,
            resumed=snapshot.state if snapshot is not None else None,
            reason=REASON,
            created_at=timestamp(),
        )
        return LineageEntry(record, parent, snapshot)

    def _rollback(self, generation: int, target: TrainingProgress) -> Rollback:
        verdict = self._request.verdict
        return Rollback(
            generation=generation,
            job_uid=self._holder.job_uid,
            cause=verdict.cause or "LossSpike",
            step=verdict.step,
            since=verdict.since,
            to_step=target.step,
            skipped=self._request.range_after(target.step, target.skipped),
            slowed=self._request.slowed_after(target.step),
        )

    def _prefers_snapshot(self, checkpoint: int) -> bool:
        """Decide whether to resume from the snapshot instead of the checkpoint of this step.

        It must lose fewer steps, and the checkpoint must lie after the targets of earlier rollbacks, which may be where
        the trouble comes from.
        """
        tried = max((rollback.to_step for rollback in self._holder.rollbacks), default=-1)
        return self._snapshot is not None and self._snapshot.state.step > checkpoint > tried

    def _choose(self, listing: Listing) -> tuple[ParentChoice, Manifest | None]:
        """Choose a checkpoint with a readable manifest; its shards are verified by the load."""
        rejected: tuple[str, ...] = ()
        while True:
            choice = choose_rollback(listing, self._request.verdict.since, rejected)
            try:
                return choice, None if choice.parent is None else read_manifest(self._store, choice.parent)
            except CheckpointCorrupt as corrupt:
                rejected = (*rejected, corrupt.key)
