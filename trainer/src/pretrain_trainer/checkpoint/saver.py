"""Asynchronous saves of one process: copied at a step boundary, uploaded and committed by a thread.

With plain data parallelism rank 0 saves alone, without any collective. If the state is sharded, the threads of all
ranks agree over a process group of their own: on the training group, their collectives would mix with the step loop's.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from pretrain_api.checkpoint.lineage import LineageRecord, Manifest, StoredObject, manifest_key
from pretrain_api.messages.reports import Saved, SaveFailed
from pretrain_api.spec.job import Retain
from pretrain_sdk.scratch import Scratch
from pretrain_store.port import ObjectStore
from pretrain_trainer.checkpoint.dcp.layout import Layout, LayoutSignature, copy_to_host, write_layout
from pretrain_trainer.checkpoint.history.commit import Retention, commit_save, upload
from pretrain_trainer.core.collectives import Collectives
from pretrain_trainer.core.errors import SupersededError
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.ranks import Ranks
from pretrain_trainer.core.stage_timer import StageTimer

_ANY_ERROR = (Exception, CheckpointException)
"""A failed save is reported and never fatal, whatever the reason. DCP's own error is no Exception."""
_SUPERSEDED = "a later generation of another job continues this history: this one must stop"


class _SaveDecision(IntEnum):
    """Decision on a requested save. Rank 0 decides: the other ranks' threads may be a moment behind."""

    BEGIN = 0
    JOIN = 1
    SKIP = 2
    STOP = 3


@dataclass(frozen=True)
class SaveResult:
    """Result of the save of a step: its committed manifest, or the failure."""

    step: int
    manifest: Manifest | None
    failure: str = ""


@dataclass(frozen=True)
class _RankUpload:
    """One rank's contribution to a checkpoint: its objects, or the failure."""

    objects: tuple[StoredObject, ...] = ()
    failure: str = ""
    laid_out: bool = True


@dataclass
class _InFlightSave:
    """A save under way. Its thread is a daemon: a store that hangs must not keep a process from ending."""

    progress: TrainingProgress
    began: float
    stall: float
    stages: StageTimer
    thread: threading.Thread = field(init=False)


class AsyncSaver:
    """The one holder of this process's saves: the one in flight, its result, and the reports of all.

    `group`: the processes that each save their shards; without one, rank 0 has all state and saves alone.
    """

    def __init__(
        self,
        store: ObjectStore,
        record: LineageRecord,
        retain: Retain,
        ranks: Ranks,
        group: dist.ProcessGroup | None,
        environ: Mapping[str, str],
    ) -> None:
        self._store = store
        self._retain = retain
        self._ranks = ranks
        self._group = group
        self._environ = environ
        self._training_group = Collectives(None)
        self._scratch: Scratch | None = None
        self._layout: Layout | None = None
        self._in_flight: _InFlightSave | None = None
        self._outcomes: deque[Saved | SaveFailed] = deque()
        self._record = record
        self._retention = Retention(store, record, retain)
        self._result: SaveResult | None = None

    def resume_as(self, record: LineageRecord) -> None:
        """Save for the generation of this record from now on. No save may be in flight."""
        self._record = record
        self._retention = Retention(self._store, record, self._retain)
        self._result = None

    @property
    def sharded(self) -> bool:
        """True if every rank saves a part of the state."""
        return self._group is not None

    @property
    def step_in_flight(self) -> int | None:
        """The step of the save in flight."""
        save = self._in_flight
        return save.progress.step if save is not None and save.thread.is_alive() else None

    def save(self, progress: TrainingProgress, tensors: Callable[[], Mapping[str, Tensor]]) -> float:
        """Start a save; return the seconds of the stall. Collective if the state is sharded.

        A save of the same step is joined. While one of another step is in flight, the new one is reported as failed.
        Raises SupersededError when a later generation continues the history.
        """
        if not self._ranks.first and not self.sharded:
            return 0.0
        match self._decide(progress.step):
            case _SaveDecision.BEGIN:
                return self._begin(progress, tensors())
            case _SaveDecision.SKIP:
                if self._ranks.first:
                    message = f"the save of step {self.step_in_flight} was still under way"
                    self.report_failure(progress.step, message)
            case _SaveDecision.STOP:
                raise SupersededError(self._retention.superseded or _SUPERSEDED)
            case _SaveDecision.JOIN:
                pass
        return 0.0

    def report_failure(self, step: int, message: str) -> None:
        """Report a save that failed or was not begun."""
        self._outcomes.append(SaveFailed(step=step, message=message))

    def poll(self) -> tuple[Saved | SaveFailed, ...]:
        """Return the saves and failures since the last call, on rank 0; nothing elsewhere. Raises SupersededError."""
        if not self._ranks.first:
            return ()
        outcomes = tuple(self._outcomes.popleft() for _ in range(len(self._outcomes)))
        if not outcomes and self._retention.superseded:
            raise SupersededError(self._retention.superseded)
        return outcomes

    def wait(self) -> str | None:
        """Wait for the save in flight; return the manifest's key of the last save, None if it failed. Collective.

        Raises SupersededError, on all ranks alike.
        """
        self._join()
        manifest = self._result.manifest if self._result is not None else None
        key = manifest_key(manifest.generation, manifest.step) if manifest is not None else None
        key, superseded = self._training_group.broadcast_object((key, self._retention.superseded))
        if superseded is not None:
            raise SupersededError(superseded)
        return key

    def close(self) -> None:
        """Free the staging memory. A save in flight fails: `wait` for it first."""
        if self._scratch is not None:
            self._scratch.close()

    def _decide(self, step: int) -> _SaveDecision:
        own, in_flight, result = _SaveDecision.BEGIN, self.step_in_flight, self._result
        if self._retention.superseded:
            own = _SaveDecision.STOP
        elif in_flight is not None:
            own = _SaveDecision.JOIN if in_flight == step else _SaveDecision.SKIP
        elif result is not None and result.step == step and result.manifest is not None:
            own = _SaveDecision.JOIN
        if not self.sharded:
            return own
        return _SaveDecision(self._training_group.all_reduce_max(own if self._ranks.first else _SaveDecision.BEGIN))

    def _begin(self, progress: TrainingProgress, tensors: Mapping[str, Tensor]) -> float:
        """Copy the tensors and start the thread; return the seconds of the copy."""
        self._join()
        began, stages = time.perf_counter(), StageTimer()
        layout = self._layout
        if layout is not None and layout.signature == LayoutSignature.of(tensors):
            layout.fill(tensors)
            make = partial(_same, layout)
        else:
            make = self._first_layout(tensors, copy_to_host(tensors))
        stages.done("copy")
        save = _InFlightSave(progress, began, stages.seconds["copy"], stages)
        save.thread = threading.Thread(target=self._finish, args=(save, make), name="checkpoint", daemon=True)
        self._in_flight = save
        save.thread.start()
        return save.stall

    def _join(self) -> None:
        if self._in_flight is not None:
            self._in_flight.thread.join()

    def _first_layout(self, tensors: Mapping[str, Tensor], copies: dict[str, Tensor]) -> Callable[[], Layout]:
        def make() -> Layout:
            self.close()
            self._scratch = Scratch.with_room(sum(item.nbytes for item in copies.values()), self._environ)
            return write_layout(self._scratch.path, tensors, copies, self._group)

        return make

    def _finish(self, save: _InFlightSave, make: Callable[[], Layout]) -> None:
        step = save.progress.step
        try:
            result = self._upload_and_commit(save, make)
        except _ANY_ERROR as error:
            result = SaveResult(step, None, _message(error))
        self._result = result
        if not self._ranks.first:
            return
        if result.manifest is None:
            self.report_failure(step, result.failure)
            return
        self._outcomes.append(
            Saved(
                step=step,
                checkpoint=manifest_key(self._record.generation, step),
                bytes=result.manifest.bytes,
                stall_seconds=save.stall,
                seconds=time.perf_counter() - save.began,
                stages=save.stages.seconds,
            )
        )
        self._retention.apply()

    def _upload_and_commit(self, save: _InFlightSave, make: Callable[[], Layout]) -> SaveResult:
        """Upload this rank's part; once all ranks have, rank 0 commits. All ranks get the same result."""
        progress, stages = save.progress, save.stages
        layout, part = self._upload(progress.step, make)
        stages.done("upload")
        savers = Collectives(self._group) if self._group is not None else None
        parts = savers.all_gather_object(part) if savers else [part]
        stages.done("agree")
        failures = [f"rank {rank}: {part.failure}" for rank, part in enumerate(parts) if part.failure]
        self._layout = layout if all(part.laid_out for part in parts) else None  # all ranks make it together
        if failures:
            return SaveResult(progress.step, None, "; ".join(failures))
        result = self._commit(progress, tuple(item for part in parts for item in part.objects))
        stages.done("commit")
        return savers.broadcast_object(result) if savers else result

    def _commit(self, progress: TrainingProgress, objects: tuple[StoredObject, ...]) -> SaveResult:
        """Put the manifest, on rank 0."""
        if not self._ranks.first:
            return SaveResult(progress.step, None)
        try:
            return SaveResult(progress.step, commit_save(self._store, self._record, progress, objects))
        except _ANY_ERROR as error:
            return SaveResult(progress.step, None, _message(error))

    def _upload(self, step: int, make: Callable[[], Layout]) -> tuple[Layout | None, _RankUpload]:
        layout = None
        try:
            layout = make()
            return layout, _RankUpload(upload(self._store, layout, self._record.generation, step))
        except _ANY_ERROR as error:
            return layout, _RankUpload(failure=_message(error), laid_out=layout is not None)


def _same(layout: Layout) -> Layout:
    return layout


def _message(error: BaseException) -> str:
    return str(error) or type(error).__name__
