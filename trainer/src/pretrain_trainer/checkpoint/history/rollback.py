"""How a generation whose loss diverged enters the history anew, under a number that its ranks take by themselves.

Nobody has to be asked: the number is one above the highest in the lineage, and the record is put if there is none of
that number. Whoever wanted the same number meanwhile finds it taken and takes a higher one, going on from there.
"""

from __future__ import annotations

import uuid

from pretrain_api.checkpoint.lineage import LineageRecord, Manifest, Rollback, merged
from pretrain_store.errors import CheckpointCorrupt, GenerationTaken, HistoryError, StoreError
from pretrain_store.history import put_record, read_listing, read_manifest
from pretrain_store.lineage import Listing, later_record, refuse_foreign_job
from pretrain_store.parent import ParentChoice, choose_rollback, inherited_interventions
from pretrain_store.port import ObjectStore
from pretrain_trainer.checkpoint.history.claim import Entry, Refusal, now, refusal
from pretrain_trainer.checkpoint.memory.plan import Recall
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.stability.guard import RollbackRequest

REASON = "RolledBack"
"""The record's reason, where generations have why they were formed."""


class Returning:
    """Rank 0's part of one rollback. After an Obstacle it is tried again as it is: the record keeps its nonce.

    `recall`: the newest state that the holder's generation keeps in memory from before the trouble.
    """

    def __init__(self, store: ObjectStore, holder: LineageRecord, wish: RollbackRequest, recall: Recall | None) -> None:
        self._store = store
        self._holder = holder
        self._wish = wish
        self._recall = recall
        self._entry: Entry | None = None

    def enter(self) -> Entry | Refusal:
        """Put the record whose parent is the newest checkpoint from before the trouble, or of a later state in memory
        that is from before it, too."""
        try:
            if self._entry is None:
                self._entry = self._planned()
            put_record(self._store, self._entry.record)
        except (StoreError, HistoryError) as error:
            return refusal(error)
        return self._entry

    def _planned(self) -> Entry:
        holder, wish, verdict = self._holder, self._wish, self._wish.verdict
        listing = read_listing(self._store)
        if later_record(listing, holder.generation) is not None:
            refuse_foreign_job(listing, holder.job_uid, may_take_over=False)
            raise GenerationTaken(listing.highest)
        choice, parent = self._choose(listing)
        came_to = TrainingProgress.of(parent) if parent is not None else TrainingProgress()
        recall = self._recall if self._is_better(came_to.step) else None
        if recall is not None:
            came_to = recall.progress
        course = inherited_interventions(listing, parent)
        rollback = Rollback(
            generation=listing.highest + 1,
            job_uid=holder.job_uid,
            cause=verdict.cause or "LossSpike",
            step=verdict.step,
            since=verdict.since,
            to_step=came_to.step,
            skipped=wish.range_after(came_to.step, came_to.skipped),
            slowed=wish.slowed_after(came_to.step),
        )
        record = LineageRecord(
            generation=rollback.generation,
            nonce=uuid.uuid4().hex,
            job_uid=holder.job_uid,
            parent=choice.parent,
            world_size=holder.world_size,
            skipped=merged((*course.skipped, *([rollback.skipped] if rollback.skipped else []))),
            slowed=(*course.slowed, *([rollback.slowed] if rollback.slowed else [])),
            rollbacks=(*course.rollbacks, rollback),
            rejected=choice.rejected,
            resumed=recall.state if recall is not None else None,
            reason=REASON,
            created_at=now(),
        )
        return Entry(record, parent, recall)

    def _is_better(self, checkpoint: int) -> bool:
        """Whether the state in memory loses fewer steps than the checkpoint of this step, and what was gone back to
        already, which may be where the trouble comes from, is not before it."""
        tried = max((rollback.to_step for rollback in self._holder.rollbacks), default=-1)
        return self._recall is not None and self._recall.state.step > checkpoint > tried

    def _choose(self, listing: Listing) -> tuple[ParentChoice, Manifest | None]:
        """A checkpoint whose manifest can be read; whether its shards can, the load will show."""
        rejected: tuple[str, ...] = ()
        while True:
            choice = choose_rollback(listing, self._wish.verdict.since, rejected)
            try:
                return choice, None if choice.parent is None else read_manifest(self._store, choice.parent)
            except CheckpointCorrupt as corrupt:
                rejected = (*rejected, corrupt.key)
