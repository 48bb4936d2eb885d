"""Errors of the store as errors of the trainer, in a form that every rank can raise."""

from __future__ import annotations

from dataclasses import dataclass

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
from pretrain_trainer.core.errors import (
    CheckpointRejectedError,
    InvalidInput,
    NoUsableCheckpointError,
    NumberTakenError,
    StorageUnavailable,
    SupersededError,
)
from pretrain_trainer.core.waits import obstacle_behind


@dataclass(frozen=True)
class SharedError:
    """An error as data: one rank meets it, a collective shares it, and every rank raises it."""

    kind: type[Exception]
    arguments: tuple[str | int, ...]

    def error(self) -> Exception:
        """Return the error to raise."""
        return self.kind(*self.arguments)


def shared_error(error: StoreError | HistoryError) -> SharedError:
    """Translate an error of the store to the trainer's error."""
    obstacle = obstacle_behind(error) if isinstance(error, StoreError) else None
    if obstacle is not None:
        return SharedError(type(obstacle), (str(obstacle),))
    match error:
        case IdentityMismatch() | StoreRefused() | ConditionalPutUnsupported():
            return SharedError(InvalidInput, (str(error),))
        case GenerationTaken():
            return SharedError(NumberTakenError, (error.highest,))
        case PrefixTakenOver():
            return SharedError(SupersededError, (str(error),))
        case AllCheckpointsCorrupt():
            return SharedError(NoUsableCheckpointError, (str(error),))
        case CheckpointCorrupt():
            return SharedError(CheckpointRejectedError, (error.key, error.why))
        case _:  # the store contradicts itself: an object that it has just listed does not exist
            return SharedError(StorageUnavailable, (str(error),))
