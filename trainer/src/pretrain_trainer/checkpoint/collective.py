"""Parts of a restore that ranks do each for themselves, and go on from together or not at all."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TypeVar, cast

from pretrain_store.errors import CheckpointCorrupt, ObjectNotFound, StoreError
from pretrain_trainer.checkpoint.dcp.load import Unusable
from pretrain_trainer.checkpoint.history.claim import refusal
from pretrain_trainer.core.collectives import Collectives
from pretrain_trainer.core.errors import CheckpointRejectedError, CollectiveFailed
from pretrain_trainer.core.ranks import Ranks
from pretrain_trainer.core.waits import in_the_way

Result = TypeVar("Result")
DAMAGED = (CheckpointCorrupt, ObjectNotFound, Unusable)
"""Errors that no retry mends: the checkpoint is passed over."""


class _Outcome(IntEnum):
    """Of one rank's part in restoring; the worst one of any rank is that of all."""

    FINE = 0
    OBSTRUCTED = 1
    """All may try again."""
    FAILED = 2
    DAMAGED = 3


class Together:
    """The ranks that restore one checkpoint, `key`, for which damage is reported."""

    def __init__(self, ranks: Ranks, key: str) -> None:
        self.ranks = ranks
        self.key = key
        self.collectives = Collectives(None)

    def all_or_none(self, act: Callable[[], Result]) -> Result:
        """Have each rank do its part; if one fails none goes on. Collective.

        Raises CheckpointRejectedError or an Obstacle on all ranks when any found damage, or could not fetch it now.
        """
        failure: Exception | None = None
        result: Result | None = None
        try:
            result = act()
        except Exception as error:
            failure = error
        own = _outcome(failure)
        worst = self.collectives.all_reduce_max(own)
        if worst == _Outcome.FINE:
            return cast("Result", result)
        said = self.collectives.all_gather_object(f"rank {self.ranks.rank}: {failure}" if own == worst else "")
        message = next(text for text in said if text)
        if worst == _Outcome.DAMAGED:
            raise CheckpointRejectedError(self.key, message) from failure
        if worst == _Outcome.OBSTRUCTED:
            raise self._shared(failure)
        if isinstance(failure, StoreError):
            raise refusal(failure).error() from failure
        raise failure or CollectiveFailed(f"another rank could not restore: {message}")

    def _shared(self, failure: Exception | None) -> Exception:
        """The obstacle of the first rank that met one. Collective."""
        own = refusal(failure) if isinstance(failure, StoreError) else None
        return next(said for said in self.collectives.all_gather_object(own) if said is not None).error()


def _outcome(failure: Exception | None) -> _Outcome:
    if failure is None:
        return _Outcome.FINE
    if isinstance(failure, DAMAGED):
        return _Outcome.DAMAGED
    obstructed = isinstance(failure, StoreError) and in_the_way(failure) is not None
    return _Outcome.OBSTRUCTED if obstructed else _Outcome.FAILED
