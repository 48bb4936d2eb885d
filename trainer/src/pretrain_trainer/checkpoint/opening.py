"""How a generation enters the history of its prefix: whose it is, where it goes on from, and its lineage record."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from pretrain_api.lineage import JobIdentity, LineageRecord, Manifest
from pretrain_api.protocol import Generation
from pretrain_api.trainer import TrainerConfig
from pretrain_store.errors import (
    Corrupt,
    HistoryError,
    IdentityMismatch,
    NoUsableCheckpoint,
    NumberTaken,
    Refused,
    StoreError,
    Superseded,
    Unsupported,
)
from pretrain_store.history import claim_identity, put_record, read_listing, read_manifest
from pretrain_store.lineage import choose_parent, inherited, refuse_foreign
from pretrain_store.open import probe
from pretrain_store.port import ObjectStore
from pretrain_trainer.errors import (
    CheckpointRejectedError,
    InvalidInput,
    NoUsableCheckpointError,
    NumberTakenError,
    StorageUnavailable,
    SupersededError,
)
from pretrain_trainer.obstacles import in_the_way
from pretrain_trainer.progress import Progress

_ATTEMPTS = 5
"""Of an unattended run to get a number: each failure means that somebody else put a record in between."""


@dataclass(frozen=True)
class Entry:
    """The place of a generation in the history."""

    record: LineageRecord
    parent: Manifest | None

    def start(self) -> Progress:
        """Where it goes on: the parent's progress, on the course that the record sets."""
        came = Progress.of(self.parent) if self.parent is not None else Progress()
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
    """Claim the prefix for the job and put the applicant's lineage record.

    The store is looked at and probed by a job's first generation only: afterwards it is known to work. `look` says
    sooner than the store's own patience allows what is wrong with it.
    """
    try:
        if applicant.may_take_over:
            look()
            probe(store)
        claim_identity(store, applicant.identity)
        return _enter(store, applicant)
    except (StoreError, HistoryError) as error:
        return refusal(error)


def _enter(store: ObjectStore, applicant: Applicant) -> Entry:
    """An unattended run tries again when its number was taken meanwhile or the parent's manifest cannot be read."""
    for left in reversed(range(1 if applicant.number is not None else _ATTEMPTS)):
        try:
            return _enter_once(store, applicant)
        except NumberTaken:
            if not left:
                raise
        except Corrupt as corrupt:
            if not left:
                raise
            applicant = applicant.without(corrupt.key)
    raise AssertionError("the last attempt returns or raises")


def refusal(error: StoreError | HistoryError) -> Refusal:
    """What an error of the store means to the trainer."""
    obstacle = in_the_way(error) if isinstance(error, StoreError) else None
    if obstacle is not None:
        return Refusal(type(obstacle), (str(obstacle),))
    match error:
        case IdentityMismatch() | Refused() | Unsupported():
            return Refusal(InvalidInput, (str(error),))
        case NumberTaken():
            return Refusal(NumberTakenError, (error.highest,))
        case Superseded():
            return Refusal(SupersededError, (str(error),))
        case NoUsableCheckpoint():
            return Refusal(NoUsableCheckpointError, (str(error),))
        case Corrupt():
            return Refusal(CheckpointRejectedError, (error.key, error.why))
        case _:  # a store that contradicts itself: something that it has just listed is not there
            return Refusal(StorageUnavailable, (str(error),))


def _enter_once(store: ObjectStore, applicant: Applicant) -> Entry:
    listing = read_listing(store)
    refuse_foreign(listing, applicant.job_uid, may_take_over=applicant.may_take_over)
    choice = choose_parent(listing, applicant.rejected)
    parent = read_manifest(store, choice.parent) if choice.parent is not None else None
    course = inherited(listing, parent)
    record = LineageRecord(
        generation=applicant.number or listing.highest + 1,
        nonce=uuid.uuid4().hex,
        job_uid=applicant.job_uid,
        parent=choice.parent,
        world_size=applicant.world_size,
        skipped=course.skipped,
        slowed=course.slowed,
        rollbacks=course.rollbacks,
        rejected=choice.rejected,
        reason=applicant.reason,
        created_at=now(),
    )
    put_record(store, record)
    return Entry(record, parent)


def now() -> str:
    """The time for people who read the store; no rule depends on it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
