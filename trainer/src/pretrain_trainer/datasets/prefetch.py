"""Batches of shards in S3: a thread prefetches them, and all ranks wait for them together."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pretrain_api.checkpoint.lineage import StepRange
from pretrain_trainer.core.errors import DataDelayed, TrainerError
from pretrain_trainer.core.waits import ObstacleRetry
from pretrain_trainer.datasets.corpus import Batches, Reading
from pretrain_trainer.datasets.remote_sources import CachedShard

STEPS_AHEAD = 8
ROUND_SECONDS = 20.0
"""A read that takes longer is reported as delayed, and continues."""

_log = logging.getLogger(__name__)


class FetchedBatches:
    """`Batches` with shards in S3. All ranks read every step's data together: none waits unnoticed for another."""

    def __init__(
        self, batches: Batches, retry: ObstacleRetry, clock: Callable[[], float], steps_ahead: int = STEPS_AHEAD
    ) -> None:
        self._batches = batches
        self._retry = retry
        self._clock = clock
        self._prefetcher = _Prefetcher(batches, steps_ahead)
        self.filler = batches.filler

    def of_step(self, step: int, skipped: Sequence[StepRange], share: range) -> list[Tensor]:
        """See Batches. Collective."""
        reading = self._batches.reading(step, skipped, share)
        self._prefetcher.fetch_after(_Position(step, tuple(skipped), share))
        self._retry.retry_on_all_ranks(lambda: self._read(reading, step))
        return self._batches.cut(reading)

    def _read(self, reading: Reading, step: int) -> None:
        until = self._clock() + ROUND_SECONDS
        if not reading.proceed(lambda: self._clock() >= until):
            raise DataDelayed(
                f"step {step} waits for shards that are being fetched, without an error: a cache that holds all "
                "sources, or a storage nearby, shortens the wait"
            )


@dataclass(frozen=True)
class _Position:
    step: int
    skipped: tuple[StepRange, ...]
    share: range


class _Prefetcher:
    """A thread that fetches the shards of the next steps, as far as there is room.

    It ignores errors: the step that needs the shard meets and reports them.
    """

    def __init__(self, batches: Batches, steps: int) -> None:
        self._batches = batches
        self._steps = steps
        self._changed = threading.Condition()
        self._position: _Position | None = None
        self._known: dict[int, tuple[CachedShard, ...]] = {}
        self._thread = threading.Thread(target=self._run, name="look-ahead", daemon=True)

    def fetch_after(self, position: _Position) -> None:
        """Fetch the shards of the steps after this one."""
        with self._changed:
            self._position = position
            self._changed.notify()
        if self._thread.ident is None:
            self._thread.start()

    def _run(self) -> None:
        while True:
            position = self._next()
            try:
                self._fetch(position)
            except TrainerError as error:
                _log.debug("prefetch failed: %s", error)

    def _next(self) -> _Position:
        """Wait for a new position."""
        with self._changed:
            while self._position is None:
                self._changed.wait()
            position, self._position = self._position, None
            return position

    def _fetch(self, position: _Position) -> None:
        steps = range(position.step, position.step + self._steps + 1)
        self._known = {step: self._known.get(step) or self._shards(step, position) for step in steps}
        wanted = list(dict.fromkeys(shard for step in steps[1:] for shard in self._known[step]))
        keep = frozenset(shard.shard.sha256 for shards in self._known.values() for shard in shards)
        for shard in wanted:
            if self._position is not None or not shard.fetch_ahead(keep):
                return

    def _shards(self, step: int, position: _Position) -> tuple[CachedShard, ...]:
        needed = self._batches.reading(step, position.skipped, position.share).shards
        return tuple(shard for shard in needed if isinstance(shard, CachedShard))
