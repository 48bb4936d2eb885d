"""The checkpoints of one generation: what it goes on from, and its own saves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from enum import IntEnum
from functools import partial
from typing import Self

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from pretrain_api.checkpoint.lineage import JobIdentity, Manifest, Rollback, manifest_key
from pretrain_api.messages.protocol import Generation
from pretrain_api.messages.reports import Saved, SaveFailed
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_api.spec.training import Parallelism
from pretrain_store.errors import StoreError
from pretrain_store.open import check_reachable, link_folder, open_store, probe
from pretrain_store.port import ObjectStore
from pretrain_trainer.checkpoint.collective import Together
from pretrain_trainer.checkpoint.dcp.state import tensors_of
from pretrain_trainer.checkpoint.dcp.target import Target
from pretrain_trainer.checkpoint.history.claim import Applicant, Entry, Refusal, enter, refusal
from pretrain_trainer.checkpoint.history.commit import Committer
from pretrain_trainer.checkpoint.history.join import enter_remembering, own_state_before
from pretrain_trainer.checkpoint.history.rollback import Returning
from pretrain_trainer.checkpoint.memory.load import recall_state
from pretrain_trainer.checkpoint.memory.plan import Recall, Worker
from pretrain_trainer.checkpoint.memory.snapshots import NoRoom, Part, Snapshots, prune
from pretrain_trainer.checkpoint.restore import restore
from pretrain_trainer.checkpoint.saver import Saver
from pretrain_trainer.core.collectives import Collectives
from pretrain_trainer.core.errors import CheckpointRejectedError, SupersededError
from pretrain_trainer.core.mesh import Mesh
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.ranks import Ranks
from pretrain_trainer.stability.guard import RollbackRequest

_log = logging.getLogger(__name__)
_STOPPED = "a later generation of another job goes on with this history: this one must stop"


class _Verdict(IntEnum):
    """What becomes of a wish to save. Rank 0 decides: the threads of the others may be a moment behind."""

    BEGIN = 0
    JOIN = 1
    SKIP = 2
    STOP = 3


class Checkpointer:
    """Restores the parent of a generation and saves its own checkpoints. Made by `open`."""

    def __init__(
        self,
        config: TrainerConfig,
        ranks: Ranks,
        environ: Mapping[str, str],
        applicant: Applicant,
        store: ObjectStore,
        entry: Entry,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._environ = environ
        self._applicant = applicant
        self._store = store
        self._entry = entry
        self._collectives = Collectives(None)
        self._group = None if _replicated(config.training.parallelism) else _background_group()
        self._saver: Saver | None = None
        self._worker = Worker.of(ranks, environ)
        self._snapshots = self._make_snapshots()
        self._skips: list[SaveFailed] = []
        self.recalled = False
        """Whether `restore` loaded a state in memory."""
        self._returning: Returning | None = None
        self.seconds: dict[str, float] = {}
        """Time that `restore` spent, by stage."""

    @classmethod
    def open(
        cls,
        config: TrainerConfig,
        identity: JobIdentity,
        generation: Generation | None,
        ranks: Ranks,
        environ: Mapping[str, str],
    ) -> Self:
        """Enter the history of the prefix with a lineage record, which rank 0 puts. Collective.

        `generation` None: an unattended run, which takes the next free number. Raises on all ranks alike InvalidInput,
        NumberTakenError, SupersededError, NoUsableCheckpointError, CheckpointRejectedError or an Obstacle, after which
        it may be called again.
        """
        applicant = Applicant.of(config, identity, generation, ranks.world_size)
        store: ObjectStore | None = None
        said: Entry | Refusal | None = None
        try:
            store = open_store(config.checkpoint.storage, environ)
        except StoreError as error:
            said = refusal(error)
        looking = partial(check_reachable, config.checkpoint.storage, environ)
        mine = store if ranks.first else None
        if generation is not None and config.checkpoint.memory is not None:
            said = enter_remembering(mine, applicant, looking, Worker.of(ranks, environ)) or said
        elif mine is not None:
            said = enter(mine, applicant, looking)
        agreed = Collectives(None).broadcast_object(said)
        for answer in (agreed, said):
            if isinstance(answer, Refusal):
                raise answer.error()
        assert store is not None  # or this rank would have raised
        assert isinstance(agreed, Entry)  # the first rank always says something
        return cls(config, ranks, environ, applicant, store, agreed)

    @property
    def parent(self) -> Manifest | None:
        """What this generation goes on from; None on a fresh start."""
        return self._entry.parent

    @property
    def rollbacks(self) -> tuple[Rollback, ...]:
        """Those of this job so far, oldest first; a history that it took over may have others."""
        record = self._entry.record
        return tuple(rollback for rollback in record.rollbacks if rollback.job_uid == record.job_uid)

    def go_back(self, wish: RollbackRequest) -> None:
        """Enter the history anew, under the next number, from a state before a divergence. Collective.

        Saves under way are waited for, lest one come into force later. Raises on all ranks alike NumberTakenError and
        SupersededError when somebody else goes on, or an Obstacle, after which it may be called again.
        """
        self.settle_memory()
        self.wait()
        said: Entry | Refusal | None = None
        recall = own_state_before(wish.verdict.since, self._entry.record, self._worker)
        if self._ranks.first:
            self._returning = self._returning or Returning(self._store, self._entry.record, wish, recall)
            said = self._returning.enter()
        said = self._collectives.broadcast_object(said)
        if isinstance(said, Refusal):
            raise said.error()
        assert said is not None  # the first rank always says something
        self._returning, self._entry, self.recalled = None, said, False
        if self._saver is not None:
            self._saver.go_on_as(said.record.generation, self._committer())

    def restore(self, model: nn.Module, optimizer: Optimizer) -> TrainingProgress:
        """Load the later state in memory if there is one, else the parent; what is loaded was verified. Collective.

        Raises CheckpointRejectedError on all ranks when it is damaged; an unattended run goes on from an earlier one.
        Raises an Obstacle on all ranks when any of them cannot fetch it now: then it may be called again.
        """
        target = Target(model, optimizer, self._config.training.optimizer.kind)
        recall = self._entry.recall
        if recall is not None and self._remembered(recall, target):
            return self._entry.start_from(recall)
        while self.parent is not None:
            together = Together(self._ranks, manifest_key(self.parent.generation, self.parent.step))
            sharded, near = self._group is not None, link_folder(self._config.checkpoint.storage)
            try:
                self.seconds = restore(together, self._store, self.parent, target, sharded, self._environ, near)
            except CheckpointRejectedError as rejected:
                if self._applicant.number is not None:
                    raise
                self._pass_over(rejected.key)
            else:
                break
        return self._entry.start()

    def save(self, progress: TrainingProgress, model: nn.Module, optimizer: Optimizer) -> float:
        """Start to save; returns the seconds that this blocked. Collective where state is sharded.

        A save of the same step is joined. While one of another step is under way, the new one is reported as failed.
        Raises SupersededError when another job took over.
        """
        if not self._takes_part:
            return 0.0
        saver = self._saver = self._saver or self._make_saver()
        match self._verdict(saver, progress.step):
            case _Verdict.BEGIN:
                return saver.begin(progress, tensors_of(model, optimizer))
            case _Verdict.SKIP:
                if self._ranks.first:
                    saver.skip(progress.step, f"the save of step {saver.running} was still under way")
            case _Verdict.STOP:
                raise SupersededError(saver.superseded or _STOPPED)
            case _Verdict.JOIN:
                pass
        return 0.0

    def remember(self, progress: TrainingProgress, model: nn.Module, optimizer: Optimizer) -> float:
        """Keep this state in memory; returns the seconds that this blocked. Where that fails training goes on."""
        if self._snapshots is not None and self._snapshots.record != self._entry.record:
            self._snapshots = self._make_snapshots()  # it goes on under another number
        if self._snapshots is None:
            return 0.0
        try:
            return self._snapshots.take(progress, tensors_of(model, optimizer))
        except (NoRoom, OSError, RuntimeError, ValueError) as error:
            self._snapshots = None
            message = f"states are not kept in memory any more: {error}"
            _log.warning("rank %d: %s", self._ranks.rank, message)
            self._skips.append(SaveFailed(step=progress.step, message=message))
            return 0.0

    def settle_memory(self) -> None:
        """Wait until the last state in memory is sealed."""
        if self._snapshots is not None:
            self._snapshots.settle()

    def poll(self) -> tuple[Saved | SaveFailed, ...]:
        """What was saved or failed since the last call, on rank 0; nothing elsewhere. Raises SupersededError."""
        if not self._ranks.first:
            return ()
        skips, self._skips = tuple(self._skips), []
        if self._saver is None:
            return skips
        outcomes = (*skips, *self._saver.outcomes())
        if not outcomes and self._saver.superseded:
            raise SupersededError(self._saver.superseded)
        return outcomes

    def wait(self) -> str | None:
        """Wait until no save is under way; the manifest's key of the last one, None if it failed. Collective.

        Raises SupersededError, on all ranks alike.
        """
        if self._saver is not None:
            self._saver.join()
        key, stop = self._collectives.broadcast_object(self._state())
        if stop is not None:
            raise SupersededError(stop)
        return key

    def look(self) -> None:
        """Raise an Obstacle, on all ranks alike, when nothing can be saved now. Collective."""
        said: Refusal | None = None
        if self._ranks.first:
            try:
                probe(self._store)
            except StoreError as error:
                said = refusal(error)
        said = self._collectives.broadcast_object(said)
        if said is not None:
            raise said.error()

    def close(self) -> None:
        """Let go of the staging memory. A save still under way comes to nothing: `wait` for it first."""
        if self._saver is not None:
            self._saver.close()

    @property
    def _takes_part(self) -> bool:
        """Whether this rank saves anything: replicated state is saved by the first alone."""
        return self._ranks.first or self._group is not None

    def _remembered(self, recall: Recall, target: Target) -> bool:
        """Load the state in memory. False: it turned out not to fit, on all ranks; nothing was loaded."""
        together = Together(self._ranks, f"in memory of step {recall.state.step}")
        try:
            self.seconds = recall_state(together, recall, self._worker, target, self._environ)
        except CheckpointRejectedError as error:
            if self.parent is None:  # there is nothing that would be loaded over what may have been loaded
                raise
            _log.warning("%s", error)
            return False
        self.recalled = True
        return True

    def _pass_over(self, rejected: str) -> None:
        """Enter the history anew, from the newest checkpoint that was not found damaged."""
        self._applicant = self._applicant.without(rejected)
        said = self._collectives.broadcast_object(enter(self._store, self._applicant) if self._ranks.first else None)
        if isinstance(said, Refusal):
            raise said.error()
        assert said is not None
        self._entry = said

    def _make_snapshots(self) -> Snapshots | None:
        """Each part of the state is kept by one process of each worker that has it."""
        folder, rank = self._worker.folder, self._ranks.rank
        if self._config.checkpoint.memory is None or self._applicant.number is None or folder is None:
            return None
        if self._worker.speaks:
            prune(folder, self._entry.record.resumed)
        mesh = Mesh.of(self._config.training.parallelism, self._ranks.world_size, self._ranks.worker_size)
        part = mesh.part(rank)
        if any(mesh.part(other) == part for other in range(self._worker.first, rank)):
            return None
        return Snapshots(folder, self._worker.local_rank, self._entry.record, Part(part, mesh.parts))

    def _make_saver(self) -> Saver:
        return Saver(self._store, self._entry.record.generation, self._committer(), self._group, self._environ)

    def _committer(self) -> Committer | None:
        return Committer(self._store, self._entry.record, self._config.checkpoint.retain) if self._ranks.first else None

    def _verdict(self, saver: Saver, step: int) -> _Verdict:
        own = _Verdict.BEGIN
        if saver.superseded:
            own = _Verdict.STOP
        elif saver.running is not None:
            own = _Verdict.JOIN if saver.running == step else _Verdict.SKIP
        elif saver.ended is not None and saver.ended.step == step and saver.ended.manifest is not None:
            own = _Verdict.JOIN
        if self._group is None:
            return own
        return _Verdict(self._collectives.all_reduce_max(own if self._ranks.first else _Verdict.BEGIN))

    def _state(self) -> tuple[str | None, str | None]:
        """The key of the last manifest put, and why to stop: as rank 0 knows it."""
        if self._saver is None:
            return None, None
        ended = self._saver.ended
        key = manifest_key(ended.manifest.generation, ended.manifest.step) if ended and ended.manifest else None
        return key, self._saver.superseded


def _replicated(parallelism: Parallelism) -> bool:
    return parallelism.shard == "none" and parallelism.tensor == 1 and parallelism.pipeline == 1


def _background_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # this rank is a member, as all are
    return group
