"""Collective steps of a restore: they succeed on all ranks, or fail on all ranks alike."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TypeVar, cast

from pretrain_store.errors import CheckpointCorrupt, ObjectNotFound, StoreError
from pretrain_trainer.checkpoint.dcp.load import UnusableFiles
from pretrain_trainer.core.collectives import Collectives
from pretrain_trainer.core.errors import CheckpointRejectedError, CollectiveFailed
from pretrain_trainer.core.ranks import Ranks
from pretrain_trainer.core.store_errors import shared_error
from pretrain_trainer.core.waits import obstacle_behind

Result = TypeVar("Result")
DAMAGED = (CheckpointCorrupt, ObjectNotFound, UnusableFiles)
"""Errors that no retry fixes: the checkpoint is rejected."""


class _StepOutcome(IntEnum):
    """Outcome of one rank's part in a step; the worst one counts for all."""

    FINE = 0
    OBSTRUCTED = 1
    """All may retry."""
    FAILED = 2
    DAMAGED = 3


class RestoreGroup:
    """The ranks that restore one checkpoint, reported as `key` when it is damaged."""

    def __init__(self, ranks: Ranks, key: str) -> None:
        self.ranks = ranks
        self.key = key
        self.collectives = Collectives(None)

    def all_or_none(self, act: Callable[[], Result]) -> Result:
        """Have each rank do its part; if one fails, all raise. Collective.

        Raises CheckpointRejectedError or an ObstacleError on all ranks when any rank finds damage or cannot fetch now.
        """
        failure: Exception | None = None
        result: Result | None = None
        try:
            result = act()
        except Exception as error:
            failure = error
        own = _outcome(failure)
        worst = self.collectives.all_reduce_max(own)
        if worst == _StepOutcome.FINE:
            return cast("Result", result)
        messages = self.collectives.all_gather_object(f"rank {self.ranks.rank}: {failure}" if own == worst else "")
        message = next(text for text in messages if text)
        if worst == _StepOutcome.DAMAGED:
            raise CheckpointRejectedError(self.key, message) from failure
        if worst == _StepOutcome.OBSTRUCTED:
            raise self._first_obstacle(failure)
        if isinstance(failure, StoreError):
            raise shared_error(failure).error() from failure
        raise failure or CollectiveFailed(f"another rank could not restore: {message}")

    def _first_obstacle(self, failure: Exception | None) -> Exception:
        """Return the obstacle of the first rank that met one. Collective."""
        own = shared_error(failure) if isinstance(failure, StoreError) else None
        return next(shared for shared in self.collectives.all_gather_object(own) if shared is not None).error()


def _outcome(failure: Exception | None) -> _StepOutcome:
    if failure is None:
        return _StepOutcome.FINE
    if isinstance(failure, DAMAGED):
        return _StepOutcome.DAMAGED
    obstructed = isinstance(failure, StoreError) and obstacle_behind(failure) is not None
    return _StepOutcome.OBSTRUCTED if obstructed else _StepOutcome.FAILED
