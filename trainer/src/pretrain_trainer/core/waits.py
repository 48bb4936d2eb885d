"""Wait for an obstacle outside the job to disappear, then resume in the same processes.

All ranks wait in rounds. In each round every rank tries, all ranks agree on whether any of them met an obstacle, and
all pause for the same time. No collective lasts longer than one try, however long the outage, so none times out.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TypeVar

from pretrain_api.backoff import Backoff
from pretrain_api.messages.reports import Blocked, Unblocked
from pretrain_sdk.rank_link import AgentLink
from pretrain_store import errors as store
from pretrain_trainer.core.collectives import Collectives
from pretrain_trainer.core.errors import (
    AccessDeniedError,
    BucketMissingError,
    DataDelayed,
    InvalidInput,
    ObstacleError,
    StorageUnavailable,
)

Result = TypeVar("Result")

_BACKOFF = Backoff(first=1.0, factor=2.0, most=10.0, jitter=0.0)
"""Pauses between tries; without jitter, since all ranks pause alike."""
MESSAGE_LENGTH = 2000
_RESUMES = "training resumes by itself"


class ObstacleRetry:
    """Retries of the ranks of one process group. Rank 0 reports each obstacle once, and its end."""

    def __init__(
        self, link: AgentLink, reports: bool, collectives: Collectives, sleep: Callable[[float], None]
    ) -> None:
        self._link = link
        self._reports = reports
        self._collectives = collectives
        self._sleep = sleep

    def retry_until_clear(self, act: Callable[[], Result]) -> Result:
        """Call `act` until it raises no ObstacleError and return its result. It must raise on all ranks alike."""
        reported: Blocked | None = None
        for attempt in count(1):
            try:
                result = act()
            except ObstacleError as obstacle:
                reported = self._report(obstacle, reported)
                if not isinstance(obstacle, DataDelayed):
                    self._sleep(_BACKOFF.longest(attempt))
            else:
                if reported is not None and self._reports:
                    self._link.report(Unblocked())
                return result
        raise AssertionError("counting never ends")

    def retry_on_all_ranks(self, act: Callable[[], Result]) -> Result:
        """Call `act`, which may fail on some ranks only, until it succeeds on all of them. Collective.

        Every round repeats it on all ranks, including those on which it succeeded.
        """
        return self.retry_until_clear(lambda: self._try_on_all_ranks(act))

    def _try_on_all_ranks(self, act: Callable[[], Result]) -> Result:
        own: ObstacleError | None = None
        result: Result | None = None
        try:
            result = act()
        except ObstacleError as obstacle:
            own = obstacle
        if not self._collectives.all_reduce_max(0 if own is None else 1):
            return result  # type: ignore[return-value]  # act returned it
        obstacles = self._collectives.all_gather_object(None if own is None else (type(own), str(own)))
        found = [item for item in obstacles if item is not None]
        kind, message = min(found, key=lambda item: item[0] is DataDelayed)  # an obstacle to fix precedes a delay
        raise kind(message) from own

    def _report(self, obstacle: ObstacleError, reported: Blocked | None) -> Blocked:
        blocked = Blocked(reason=obstacle.reason, message=str(obstacle)[:MESSAGE_LENGTH])
        if blocked != reported and self._reports:
            self._link.report(blocked)
        return blocked


def obstacle_behind(error: store.StoreError) -> ObstacleError | None:
    """Return the obstacle behind an error of a store; None for an error that no retry resolves."""
    cause = error.__cause__
    plain = cause if isinstance(cause, store.StoreError) else error  # without a remedy of its own
    match plain:
        case store.NoSuchBucket():
            return BucketMissingError(f"{plain}: create the bucket; {_RESUMES} when it exists")
        case store.CredentialsRejected():
            return AccessDeniedError(f"{plain}: grant these credentials access, or correct them; {_RESUMES}")
        case store.StoreUnavailable():
            return StorageUnavailable(f"{plain}: check the service and the network; {_RESUMES} when it answers")
        case _:
            return None


def field_error(error: store.StoreError, field: str) -> ObstacleError | InvalidInput:
    """Translate an error of a store that `field` of the job names."""
    obstacle = obstacle_behind(error)
    return InvalidInput(f"{field}: {error}") if obstacle is None else type(obstacle)(f"{field}: {obstacle}")
