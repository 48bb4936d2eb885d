"""One process's saves: copied at once, then finished by a thread.

With plain data parallelism rank 0 saves alone, without any collective. Where state is sharded the threads of all ranks
agree over a process group of their own: collectives on the one that trains would mix with the step loop's.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from pretrain_api.checkpoint.lineage import Manifest, StoredObject, manifest_key
from pretrain_api.messages.reports import Saved, SaveFailed
from pretrain_sdk.scratch import Scratch
from pretrain_store.port import ObjectStore
from pretrain_trainer.checkpoint.dcp.layout import Layout, Signature, lay_out, staged
from pretrain_trainer.checkpoint.history.commit import Committer, upload
from pretrain_trainer.core.collectives import Collectives
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.stage_timer import StageTimer

_ANYTHING = (Exception, CheckpointException)
"""A save that fails is reported and never fatal, whatever the reason. DCP's own error is no Exception."""


@dataclass(frozen=True)
class Ended:
    """How the save of a step ended: its manifest in force, or what went wrong."""

    step: int
    manifest: Manifest | None
    failure: str = ""


@dataclass(frozen=True)
class _Part:
    """What one rank contributes to a checkpoint: its objects, or what went wrong."""

    objects: tuple[StoredObject, ...] = ()
    failure: str = ""
    laid_out: bool = True


@dataclass
class _Running:
    """A save under way. Its thread is a daemon: a store that hangs must not keep a process from ending."""

    progress: TrainingProgress
    began: float
    stall: float
    stages: StageTimer
    thread: threading.Thread = field(init=False)


class Saver:
    """Saves the tensors of this process.

    `committer` is rank 0's alone. Without a group all state is here, and no other process saves any.
    """

    def __init__(
        self,
        store: ObjectStore,
        generation: int,
        committer: Committer | None,
        group: dist.ProcessGroup | None,
        environ: Mapping[str, str],
    ) -> None:
        self._store = store
        self._generation = generation
        self._committer = committer
        self._group = group
        self._environ = environ
        self._scratch: Scratch | None = None
        self._layout: Layout | None = None
        self._running: _Running | None = None
        self._outcomes: deque[Saved | SaveFailed] = deque()
        self.ended: Ended | None = None
        """The last save that ended."""

    @property
    def running(self) -> int | None:
        """The step of the save under way."""
        running = self._running
        return running.progress.step if running is not None and running.thread.is_alive() else None

    @property
    def superseded(self) -> str | None:
        """Why this generation must stop, once it is known."""
        return self._committer.superseded if self._committer is not None else None

    def begin(self, progress: TrainingProgress, tensors: Mapping[str, Tensor]) -> float:
        """Copy the tensors and start the rest; returns the seconds that it took. No save may be under way elsewhere."""
        self.join()
        began, stages = time.perf_counter(), StageTimer()
        layout = self._layout
        if layout is not None and layout.signature == Signature.of(tensors):
            layout.fill(tensors)
            make = partial(_same, layout)
        else:
            make = self._laying_out(tensors, staged(tensors))
        stages.done("copy")
        running = _Running(progress, began, stages.seconds["copy"], stages)
        running.thread = threading.Thread(target=self._finish, args=(running, make), name="checkpoint", daemon=True)
        self._running = running
        running.thread.start()
        return running.stall

    def go_on_as(self, generation: int, committer: Committer | None) -> None:
        """Save for another generation from now on. No save may be under way."""
        self._generation, self._committer, self.ended = generation, committer, None

    def skip(self, step: int, why: str) -> None:
        """Report a save that was not begun."""
        self._outcomes.append(SaveFailed(step=step, message=why))

    def outcomes(self) -> tuple[Saved | SaveFailed, ...]:
        """What was saved or failed since the last call."""
        return tuple(self._outcomes.popleft() for _ in range(len(self._outcomes)))

    def join(self) -> None:
        """Wait until no save is under way."""
        if self._running is not None:
            self._running.thread.join()

    def close(self) -> None:
        """Remove the staging memory. A save that is still under way comes to nothing."""
        if self._scratch is not None:
            self._scratch.close()

    def _laying_out(self, tensors: Mapping[str, Tensor], copies: dict[str, Tensor]) -> Callable[[], Layout]:
        def make() -> Layout:
            self.close()
            self._scratch = Scratch.with_room(sum(item.nbytes for item in copies.values()), self._environ)
            return lay_out(self._scratch.path, tensors, copies, self._group)

        return make

    def _finish(self, running: _Running, make: Callable[[], Layout]) -> None:
        step = running.progress.step
        try:
            ended = self._commit(running, make)
        except _ANYTHING as error:
            ended = Ended(step, None, _said(error))
        self.ended = ended
        if self._committer is None:
            return
        if ended.manifest is None:
            self.skip(step, ended.failure)
            return
        self._outcomes.append(
            Saved(
                step=step,
                checkpoint=manifest_key(self._generation, step),
                bytes=ended.manifest.bytes,
                stall_seconds=running.stall,
                seconds=time.perf_counter() - running.began,
                stages=running.stages.seconds,
            )
        )
        self._committer.tidy()

    def _commit(self, running: _Running, make: Callable[[], Layout]) -> Ended:
        """Upload this rank's part; when all ranks have, rank 0 commits. All ranks come to the same end."""
        progress, stages = running.progress, running.stages
        layout, part = self._upload(progress.step, make)
        stages.done("upload")
        collectives = Collectives(self._group) if self._group is not None else None
        parts = collectives.all_gather_object(part) if collectives else [part]
        stages.done("agree")
        failures = [f"rank {rank}: {part.failure}" for rank, part in enumerate(parts) if part.failure]
        self._layout = layout if all(part.laid_out for part in parts) else None  # it is made by all together
        if failures:
            return Ended(progress.step, None, "; ".join(failures))
        ended = self._commit_first(progress, tuple(item for part in parts for item in part.objects))
        stages.done("commit")
        return collectives.broadcast_object(ended) if collectives else ended

    def _commit_first(self, progress: TrainingProgress, objects: tuple[StoredObject, ...]) -> Ended:
        if self._committer is None:
            return Ended(progress.step, None)
        try:
            return Ended(progress.step, self._committer.commit(progress, objects))
        except _ANYTHING as error:
            return Ended(progress.step, None, _said(error))

    def _upload(self, step: int, make: Callable[[], Layout]) -> tuple[Layout | None, _Part]:
        layout = None
        try:
            layout = make()
            return layout, _Part(upload(self._store, layout, self._generation, step))
        except _ANYTHING as error:
            return layout, _Part(failure=_said(error), laid_out=layout is not None)


def _same(layout: Layout) -> Layout:
    return layout


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__
