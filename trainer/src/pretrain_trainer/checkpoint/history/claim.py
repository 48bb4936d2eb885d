"""Claim of a generation's place in the lineage: identity, parent, and the lineage record."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from pretrain_api.checkpoint.lineage import JobIdentity, LineageRecord, Manifest, MemoryState
from pretrain_api.messages.protocol import Generation
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_store.errors import HistoryError, StoreError
from pretrain_store.history import claim_identity, put_record, read_listing, read_manifest
from pretrain_store.lineage import Listing, may_resume_from, refuse_foreign_job
from pretrain_store.open import probe
from pretrain_store.parent import ParentChoice, choose_parent, inherited_interventions
from pretrain_store.port import ObjectStore
from pretrain_trainer.checkpoint.memory.plan import MemorySnapshot
from pretrain_trainer.core.errors import CheckpointRejectedError, NumberTakenError
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.store_errors import SharedError, shared_error

_ATTEMPTS = 5
"""Attempts of an unattended run to get a number: each failure means that another run put a record in between."""


@dataclass(frozen=True)
class ResumePoint:
    """The history that a generation finds before its claim, and the parent it resumes from."""

    listing: Listing
    choice: ParentChoice
    parent: Manifest | None

    def allows(self, job_uid: str, state: MemoryState) -> bool:
        """Decide whether this state in memory may be restored instead of the parent."""
        return may_resume_from(self.listing, self.choice.parent, job_uid, state)


@dataclass(frozen=True)
class LineageEntry:
    """A generation's place in the lineage."""

    record: LineageRecord
    parent: Manifest | None
    snapshot: MemorySnapshot | None = None
    """The later state in memory to restore instead of the parent."""

    def start(self) -> TrainingProgress:
        """Return the parent's progress, with the record's interventions."""
        return self._with_interventions(
            TrainingProgress.of(self.parent) if self.parent is not None else TrainingProgress()
        )

    def start_from(self, snapshot: MemorySnapshot) -> TrainingProgress:
        """Return the snapshot's progress, with the record's interventions."""
        return self._with_interventions(snapshot.progress)

    def _with_interventions(self, progress: TrainingProgress) -> TrainingProgress:
        return replace(progress, skipped=self.record.skipped, slowed=self.record.slowed)


@dataclass(frozen=True)
class GenerationClaim:
    """Claim of a generation. `number` None: no coordinator assigns numbers (plain torchrun), so take the next one."""

    identity: JobIdentity
    job_uid: str
    world_size: int
    number: int | None = None
    reason: str = "Started"
    rejected: tuple[str, ...] = ()
    may_take_over: bool = True

    @classmethod
    def of(
        cls, config: TrainerConfig, identity: JobIdentity, generation: Generation | None, world_size: int
    ) -> GenerationClaim:
        """Return the claim of a generation, or of an unattended run if there is none."""
        if generation is None:
            return cls(identity, config.job_uid, world_size)
        return cls(
            identity,
            config.job_uid,
            world_size,
            generation.number,
            generation.reason,
            generation.rejected,
            generation.may_take_over,
        )

    def without(self, rejected: str) -> GenerationClaim:
        """Return the claim with one more checkpoint rejected."""
        return replace(self, rejected=(*self.rejected, rejected))


def claim_generation(
    store: ObjectStore, claim: GenerationClaim, look: Callable[[], None] = lambda: None
) -> LineageEntry | SharedError:
    """Claim the prefix for the job and put the lineage record; see `find_resume_point` and `put_claim`.

    An unattended run retries when its number is taken meanwhile or the parent's manifest cannot be read.
    """
    result: LineageEntry | SharedError | None = None
    for _ in range(1 if claim.number is not None else _ATTEMPTS):
        found = find_resume_point(store, claim, look)
        result = found if isinstance(found, SharedError) else put_claim(store, claim, found, None)
        if not isinstance(result, SharedError):
            return result
        if result.kind is CheckpointRejectedError:
            claim = claim.without(str(result.arguments[0]))
        elif result.kind is not NumberTakenError:
            return result
    assert result is not None
    return result


def find_resume_point(
    store: ObjectStore, claim: GenerationClaim, look: Callable[[], None] = lambda: None
) -> ResumePoint | SharedError:
    """Claim the prefix for the job and find the parent to resume from.

    Only a job's first generation checks and probes the store: afterwards it is known to work. `look` reports an
    unreachable store sooner than the store's own retries do.
    """
    try:
        if claim.may_take_over:
            look()
            probe(store)
        claim_identity(store, claim.identity)
        listing = read_listing(store)
        refuse_foreign_job(listing, claim.job_uid, may_take_over=claim.may_take_over)
        choice = choose_parent(listing, claim.rejected)
        parent = read_manifest(store, choice.parent) if choice.parent is not None else None
    except (StoreError, HistoryError) as error:
        return shared_error(error)
    return ResumePoint(listing, choice, parent)


def put_claim(
    store: ObjectStore, claim: GenerationClaim, found: ResumePoint, snapshot: MemorySnapshot | None
) -> LineageEntry | SharedError:
    """Put the claim's lineage record, which names the parent."""
    interventions = inherited_interventions(found.listing, found.parent)
    record = LineageRecord(
        generation=claim.number or found.listing.highest + 1,
        nonce=uuid.uuid4().hex,
        job_uid=claim.job_uid,
        parent=found.choice.parent,
        world_size=claim.world_size,
        skipped=interventions.skipped,
        slowed=interventions.slowed,
        rollbacks=interventions.rollbacks,
        rejected=found.choice.rejected,
        resumed=snapshot.state if snapshot is not None else None,
        reason=claim.reason,
        created_at=timestamp(),
    )
    try:
        put_record(store, record)
    except (StoreError, HistoryError) as error:
        return shared_error(error)
    return LineageEntry(record, found.parent, snapshot)


def timestamp() -> str:
    """Return the time for readers of the store; no rule depends on it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
