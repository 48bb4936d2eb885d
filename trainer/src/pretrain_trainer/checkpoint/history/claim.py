"""How a generation enters the history of its prefix: whose it is, where it goes on from, and its lineage record."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from pretrain_api.checkpoint.lineage import JobIdentity, LineageRecord, Manifest, MemoryState
from pretrain_api.messages.protocol import Generation
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_store.errors import (
    AllCheckpointsCorrupt,
    CheckpointCorrupt,
    ConditionalPutUnsupported,
    GenerationTaken,
    HistoryError,
    IdentityMismatch,
    PrefixTakenOver,
    StoreError,
    StoreRefused,
)
from pretrain_store.history import claim_identity, put_record, read_listing, read_manifest
from pretrain_store.lineage import Listing, may_resume_from, refuse_foreign_job
from pretrain_store.open import probe
from pretrain_store.parent import ParentChoice, choose_parent, inherited_interventions
from pretrain_store.port import ObjectStore
from pretrain_trainer.checkpoint.memory.plan import Recall
from pretrain_trainer.core.errors import (
    CheckpointRejectedError,
    InvalidInput,
    NoUsableCheckpointError,
    NumberTakenError,
    StorageUnavailable,
    SupersededError,
)
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.waits import in_the_way

_ATTEMPTS = 5
"""Of an unattended run to get a number: each failure means that somebody else put a record in between."""


@dataclass(frozen=True)
class Survey:
    """What a generation finds before it enters: the history, and where it goes on from."""

    listing: Listing
    choice: ParentChoice
    parent: Manifest | None

    def allows(self, job_uid: str, state: MemoryState) -> bool:
        """Whether this state in memory may be restored instead of the parent."""
        return may_resume_from(self.listing, self.choice.parent, job_uid, state)


@dataclass(frozen=True)
class Entry:
    """The place of a generation in the history."""

    record: LineageRecord
    parent: Manifest | None
    recall: Recall | None = None
    """The later state in memory that is restored instead of the parent."""

    def start(self) -> TrainingProgress:
        """Where it goes on: the parent's progress, on the course that the record sets."""
        return self._on_course(TrainingProgress.of(self.parent) if self.parent is not None else TrainingProgress())

    def start_from(self, recall: Recall) -> TrainingProgress:
        """The same where the state in memory is restored."""
        return self._on_course(recall.progress)

    def _on_course(self, came: TrainingProgress) -> TrainingProgress:
        return replace(came, skipped=self.record.skipped, slowed=self.record.slowed)


@dataclass(frozen=True)
class Refusal:
    """Why there is no place, as an error that each rank can raise for itself."""

    kind: type[Exception]
    arguments: tuple[str | int, ...]

    def error(self) -> Exception:
        """The error to raise."""
        return self.kind(*self.arguments)


@dataclass(frozen=True)
class Applicant:
    """Who wants to enter. `number` None: nobody assigns numbers (plain torchrun), so the next free one is taken."""

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
    ) -> Applicant:
        """The applicant that a generation is, or an unattended run where there is none."""
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

    def without(self, rejected: str) -> Applicant:
        """The same, which passes over one more checkpoint."""
        return replace(self, rejected=(*self.rejected, rejected))


def enter(store: ObjectStore, applicant: Applicant, look: Callable[[], None] = lambda: None) -> Entry | Refusal:
    """Claim the prefix for the job and put the applicant's lineage record; see `survey` and `put`.

    An unattended run tries again when its number was taken meanwhile or the parent's manifest cannot be read.
    """
    said: Entry | Refusal | None = None
    for _ in range(1 if applicant.number is not None else _ATTEMPTS):
        found = survey(store, applicant, look)
        said = found if isinstance(found, Refusal) else put(store, applicant, found, None)
        if not isinstance(said, Refusal):
            return said
        if said.kind is CheckpointRejectedError:
            applicant = applicant.without(str(said.arguments[0]))
        elif said.kind is not NumberTakenError:
            return said
    assert said is not None
    return said


def survey(store: ObjectStore, applicant: Applicant, look: Callable[[], None] = lambda: None) -> Survey | Refusal:
    """Claim the prefix for the job and find out where it goes on from.

    The store is looked at and probed by a job's first generation only: afterwards it is known to work. `look` says
    sooner than the store's own patience allows what is wrong with it.
    """
    try:
        if applicant.may_take_over:
            look()
            probe(store)
        claim_identity(store, applicant.identity)
        listing = read_listing(store)
        refuse_foreign_job(listing, applicant.job_uid, may_take_over=applicant.may_take_over)
        choice = choose_parent(listing, applicant.rejected)
        parent = read_manifest(store, choice.parent) if choice.parent is not None else None
    except (StoreError, HistoryError) as error:
        return refusal(error)
    return Survey(listing, choice, parent)


def put(store: ObjectStore, applicant: Applicant, found: Survey, recall: Recall | None) -> Entry | Refusal:
    """Put the applicant's lineage record, which says what it goes on from."""
    course = inherited_interventions(found.listing, found.parent)
    record = LineageRecord(
        generation=applicant.number or found.listing.highest + 1,
        nonce=uuid.uuid4().hex,
        job_uid=applicant.job_uid,
        parent=found.choice.parent,
        world_size=applicant.world_size,
        skipped=course.skipped,
        slowed=course.slowed,
        rollbacks=course.rollbacks,
        rejected=found.choice.rejected,
        resumed=recall.state if recall is not None else None,
        reason=applicant.reason,
        created_at=now(),
    )
    try:
        put_record(store, record)
    except (StoreError, HistoryError) as error:
        return refusal(error)
    return Entry(record, found.parent, recall)


def refusal(error: StoreError | HistoryError) -> Refusal:
    """What an error of the store means to the trainer."""
    obstacle = in_the_way(error) if isinstance(error, StoreError) else None
    if obstacle is not None:
        return Refusal(type(obstacle), (str(obstacle),))
    match error:
        case IdentityMismatch() | StoreRefused() | ConditionalPutUnsupported():
            return Refusal(InvalidInput, (str(error),))
        case GenerationTaken():
            return Refusal(NumberTakenError, (error.highest,))
        case PrefixTakenOver():
            return Refusal(SupersededError, (str(error),))
        case AllCheckpointsCorrupt():
            return Refusal(NoUsableCheckpointError, (str(error),))
        case CheckpointCorrupt():
            return Refusal(CheckpointRejectedError, (error.key, error.why))
        case _:  # a store that contradicts itself: something that it has just listed is not there
            return Refusal(StorageUnavailable, (str(error),))


def now() -> str:
    """The time for people who read the store; no rule depends on it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
