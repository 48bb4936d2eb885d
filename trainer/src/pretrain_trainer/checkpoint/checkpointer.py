"""Checkpoints of one generation: its claim, its restore, its saves and its snapshots in memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
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
from pretrain_trainer.checkpoint.dcp.restore_group import RestoreGroup
from pretrain_trainer.checkpoint.dcp.state import tensors_of
from pretrain_trainer.checkpoint.dcp.target import RestoreTarget
from pretrain_trainer.checkpoint.history.claim import GenerationClaim, LineageEntry, claim_generation
from pretrain_trainer.checkpoint.history.join import claim_with_memory, own_snapshot_before
from pretrain_trainer.checkpoint.history.rollback import RollbackClaim
from pretrain_trainer.checkpoint.memory.load import restore_from_memory
from pretrain_trainer.checkpoint.memory.plan import MemorySnapshot, WorkerMemory
from pretrain_trainer.checkpoint.memory.snapshots import (
    InsufficientMemory,
    SnapshotWriter,
    StatePart,
    remove_snapshots_except,
)
from pretrain_trainer.checkpoint.restore import restore
from pretrain_trainer.checkpoint.saver import AsyncSaver
from pretrain_trainer.core.collectives import Collectives
from pretrain_trainer.core.errors import CheckpointRejectedError
from pretrain_trainer.core.mesh import Mesh
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.ranks import Ranks
from pretrain_trainer.core.store_errors import SharedError, shared_error
from pretrain_trainer.stability.guard import RollbackRequest

_log = logging.getLogger(__name__)


class Checkpointer:
    """Restores the parent of a generation and saves its own checkpoints. Made by `open`."""

    def __init__(
        self,
        config: TrainerConfig,
        ranks: Ranks,
        environ: Mapping[str, str],
        claim: GenerationClaim,
        store: ObjectStore,
        entry: LineageEntry,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._environ = environ
        self._claim = claim
        self._store = store
        self._entry = entry
        self._collectives = Collectives(None)
        group = None if _replicated(config.training.parallelism) else _background_group()
        self._saver = AsyncSaver(store, entry.record, config.checkpoint.retain, ranks, group, environ)
        self._memory = WorkerMemory.of(ranks, environ)
        self._snapshots = self._make_snapshots()
        self.recalled = False
        """True if `restore` loaded a snapshot in memory."""
        self._rollback: RollbackClaim | None = None
        self.seconds: dict[str, float] = {}
        """Seconds of `restore`, by stage."""

    @classmethod
    def open(
        cls,
        config: TrainerConfig,
        identity: JobIdentity,
        generation: Generation | None,
        ranks: Ranks,
        environ: Mapping[str, str],
    ) -> Self:
        """Claim the generation with a lineage record, which rank 0 puts. Collective.

        `generation` None: an unattended run, which takes the next free number. Raises on all ranks alike InvalidInput,
        NumberTakenError, SupersededError, NoUsableCheckpointError, CheckpointRejectedError or an ObstacleError, after
        which it may be called again.
        """
        claim = GenerationClaim.of(config, identity, generation, ranks.world_size)
        store: ObjectStore | None = None
        own: LineageEntry | SharedError | None = None
        try:
            store = open_store(config.checkpoint.storage, environ)
        except StoreError as error:
            own = shared_error(error)
        look = partial(check_reachable, config.checkpoint.storage, environ)
        mine = store if ranks.first else None
        if generation is not None and config.checkpoint.memory is not None:
            own = claim_with_memory(mine, claim, look, WorkerMemory.of(ranks, environ)) or own
        elif mine is not None:
            own = claim_generation(mine, claim, look)
        agreed = Collectives(None).broadcast_object(own)
        for result in (agreed, own):
            if isinstance(result, SharedError):
                raise result.error()
        assert store is not None  # else this rank has raised
        assert isinstance(agreed, LineageEntry)  # rank 0 always has a result
        return cls(config, ranks, environ, claim, store, agreed)

    @property
    def parent(self) -> Manifest | None:
        """The checkpoint that this generation resumes from; None on a fresh start."""
        return self._entry.parent

    @property
    def rollbacks(self) -> tuple[Rollback, ...]:
        """The rollbacks of this job so far, oldest first, without those of a job whose history it took over."""
        record = self._entry.record
        return tuple(rollback for rollback in record.rollbacks if rollback.job_uid == record.job_uid)

    def go_back(self, wish: RollbackRequest) -> None:
        """Claim the next number of the lineage, from a state before a divergence. Collective.

        Waits for saves in flight, so that none commits later. Raises on all ranks alike NumberTakenError and
        SupersededError when another generation continues, or an ObstacleError, after which it may be called again.
        """
        self.settle_memory()
        self.wait()
        result: LineageEntry | SharedError | None = None
        snapshot = own_snapshot_before(wish.verdict.since, self._entry.record, self._memory)
        if self._ranks.first:
            self._rollback = self._rollback or RollbackClaim(self._store, self._entry.record, wish, snapshot)
            result = self._rollback.enter()
        self._enter(result)
        self._rollback, self.recalled = None, False

    def restore(self, model: nn.Module, optimizer: Optimizer) -> TrainingProgress:
        """Load the later snapshot in memory if there is one, else the parent; both are verified. Collective.

        Raises CheckpointRejectedError on all ranks when the parent is corrupt; an unattended run resumes from an
        earlier one. Raises an ObstacleError on all ranks when any of them cannot fetch it now: then it may be called
        again.
        """
        target = RestoreTarget(model, optimizer, self._config.training.optimizer.kind)
        snapshot = self._entry.snapshot
        if snapshot is not None and self._restored_from_memory(snapshot, target):
            return self._entry.start_from(snapshot)
        while self.parent is not None:
            group = RestoreGroup(self._ranks, manifest_key(self.parent.generation, self.parent.step))
            near = link_folder(self._config.checkpoint.storage)
            try:
                self.seconds = restore(
                    group, self._store, self.parent, target, self._saver.sharded, self._environ, near
                )
            except CheckpointRejectedError as rejected:
                if self._claim.number is not None:
                    raise
                self._skip(rejected.key)
            else:
                break
        return self._entry.start()

    def save(self, progress: TrainingProgress, model: nn.Module, optimizer: Optimizer) -> float:
        """Start a save; return the seconds of the stall. See AsyncSaver.save."""
        return self._saver.save(progress, lambda: tensors_of(model, optimizer))

    def remember(self, progress: TrainingProgress, model: nn.Module, optimizer: Optimizer) -> float:
        """Take a snapshot in memory; return the seconds of the stall. A failure ends snapshots, not training."""
        if self._snapshots is not None and self._snapshots.record != self._entry.record:
            self._snapshots = self._make_snapshots()  # the generation has a new number
        if self._snapshots is None:
            return 0.0
        try:
            return self._snapshots.take(progress, tensors_of(model, optimizer))
        except (InsufficientMemory, OSError, RuntimeError, ValueError) as error:
            self._snapshots = None
            message = f"states are not kept in memory any more: {error}"
            _log.warning("rank %d: %s", self._ranks.rank, message)
            self._saver.report_failure(progress.step, message)
            return 0.0

    def settle_memory(self) -> None:
        """Wait until the last snapshot in memory is sealed."""
        if self._snapshots is not None:
            self._snapshots.settle()

    def poll(self) -> tuple[Saved | SaveFailed, ...]:
        """Return the saves and failures since the last call, on rank 0; nothing elsewhere. Raises SupersededError."""
        return self._saver.poll()

    def wait(self) -> str | None:
        """Wait for the save in flight; return the manifest's key of the last save, None if it failed. Collective.

        Raises SupersededError, on all ranks alike.
        """
        return self._saver.wait()

    def look(self) -> None:
        """Raise an ObstacleError, on all ranks alike, when nothing can be saved now. Collective."""
        own: SharedError | None = None
        if self._ranks.first:
            try:
                probe(self._store)
            except StoreError as error:
                own = shared_error(error)
        agreed = self._collectives.broadcast_object(own)
        if agreed is not None:
            raise agreed.error()

    def close(self) -> None:
        """Free the staging memory. A save in flight fails: `wait` for it first."""
        self._saver.close()

    def _restored_from_memory(self, snapshot: MemorySnapshot, target: RestoreTarget) -> bool:
        """Load the snapshot. False, on all ranks: it does not match the model, and nothing was loaded."""
        group = RestoreGroup(self._ranks, f"in memory of step {snapshot.state.step}")
        try:
            self.seconds = restore_from_memory(group, snapshot, self._memory, target, self._environ)
        except CheckpointRejectedError as error:
            if self.parent is None:  # no checkpoint would overwrite a partial load
                raise
            _log.warning("%s", error)
            return False
        self.recalled = True
        return True

    def _skip(self, rejected: str) -> None:
        """Claim the next number, from the newest checkpoint that is not known to be corrupt."""
        self._claim = self._claim.without(rejected)
        self._enter(claim_generation(self._store, self._claim) if self._ranks.first else None)

    def _enter(self, own: LineageEntry | SharedError | None) -> None:
        """Adopt rank 0's new place in the lineage, or raise its error. Collective."""
        entry = self._collectives.broadcast_object(own)
        if isinstance(entry, SharedError):
            raise entry.error()
        assert entry is not None  # rank 0 always has a result
        self._entry = entry
        self._saver.resume_as(entry.record)

    def _make_snapshots(self) -> SnapshotWriter | None:
        """Make the writer of this process's part, unless an earlier process of the worker has the same part."""
        folder, rank = self._memory.folder, self._ranks.rank
        if self._config.checkpoint.memory is None or self._claim.number is None or folder is None:
            return None
        if self._memory.reports:
            remove_snapshots_except(folder, self._entry.record.resumed)
        mesh = Mesh.of(self._config.training.parallelism, self._ranks.world_size, self._ranks.worker_size)
        part = mesh.part(rank)
        if any(mesh.part(other) == part for other in range(self._memory.first, rank)):
            return None
        return SnapshotWriter(folder, self._memory.local_rank, self._entry.record, StatePart(part, mesh.parts))


def _replicated(parallelism: Parallelism) -> bool:
    return parallelism.shard == "none" and parallelism.tensor == 1 and parallelism.pipeline == 1


def _background_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # this rank is a member, as all are
    return group
