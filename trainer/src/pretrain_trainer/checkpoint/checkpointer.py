"""The checkpoints of one generation: what it goes on from, and its own saves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from enum import IntEnum
from functools import partial
from typing import Self, TypeVar, cast

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from pretrain_api.lineage import JobIdentity, Manifest, manifest_key
from pretrain_api.protocol import Generation
from pretrain_api.reports import Saved, SaveFailed
from pretrain_api.trainer import TrainerConfig
from pretrain_api.training import Parallelism
from pretrain_store.errors import StoreError
from pretrain_store.open import look, open_store, probe
from pretrain_store.port import ObjectStore
from pretrain_trainer.checkpoint.agreement import Agreement
from pretrain_trainer.checkpoint.committing import Committer
from pretrain_trainer.checkpoint.loading import Loading
from pretrain_trainer.checkpoint.opening import Applicant, Entry, Refusal, enter, refusal
from pretrain_trainer.checkpoint.restoring import DAMAGED, fetch
from pretrain_trainer.checkpoint.saving import Saver
from pretrain_trainer.checkpoint.scratch import Scratch
from pretrain_trainer.checkpoint.state import tensors_of
from pretrain_trainer.errors import CheckpointRejectedError, CollectiveFailed, SupersededError
from pretrain_trainer.obstacles import in_the_way
from pretrain_trainer.progress import Progress
from pretrain_trainer.ranks import Ranks

Result = TypeVar("Result")
_STOPPED = "a later generation of another job goes on with this history: this one must stop"


class _Outcome(IntEnum):
    """Of one rank's part in restoring; the worst one of any rank is that of all."""

    FINE = 0
    OBSTRUCTED = 1
    """All may try again."""
    FAILED = 2
    DAMAGED = 3


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
        self._agreement = Agreement(None)
        self._group = None if _replicated(config.training.parallelism) else _background_group()
        self._saver: Saver | None = None
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
            if ranks.first:
                said = enter(store, applicant, partial(look, config.checkpoint.storage, environ))
        except StoreError as error:
            said = refusal(error)
        agreed = Agreement(None).first_says(said)
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

    def restore(self, model: nn.Module, optimizer: Optimizer) -> Progress:
        """Load the parent, each file after its digest was checked. Collective; without a parent nothing is done.

        Raises CheckpointRejectedError on all ranks when it is damaged; an unattended run goes on from an earlier one.
        Raises an Obstacle on all ranks when any of them cannot fetch it now: then it may be called again.
        """
        while self.parent is not None:
            try:
                self._load(self.parent, model, optimizer)
            except CheckpointRejectedError as rejected:
                if self._applicant.number is not None:
                    raise
                self._pass_over(rejected.key)
            else:
                break
        return self._entry.start()

    def save(self, progress: Progress, model: nn.Module, optimizer: Optimizer) -> float:
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

    def poll(self) -> tuple[Saved | SaveFailed, ...]:
        """What was saved or failed since the last call, on rank 0; nothing elsewhere. Raises SupersededError."""
        if self._saver is None or not self._ranks.first:
            return ()
        outcomes = self._saver.outcomes()
        if not outcomes and self._saver.superseded:
            raise SupersededError(self._saver.superseded)
        return outcomes

    def wait(self) -> str | None:
        """Wait until no save is under way; the manifest's key of the last one, None if it failed. Collective.

        Raises SupersededError, on all ranks alike.
        """
        if self._saver is not None:
            self._saver.join()
        key, stop = self._agreement.first_says(self._state())
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
        said = self._agreement.first_says(said)
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

    def _load(self, parent: Manifest, model: nn.Module, optimizer: Optimizer) -> None:
        with ExitStack() as stack:
            began = time.perf_counter()

            def fetched() -> tuple[Scratch, Loading]:
                scratch = stack.enter_context(Scratch.with_room(parent.bytes, self._environ))
                kind = self._config.training.optimizer.kind
                return scratch, fetch(self._store, parent, scratch.path, model, optimizer, kind)

            scratch, loading = self._all_or_none(parent, fetched)
            verified = time.perf_counter()
            self._all_or_none(parent, lambda: loading.load(scratch.path))
            self.seconds = {"verify": verified - began, "load": time.perf_counter() - verified}

    def _all_or_none(self, parent: Manifest, act: Callable[[], Result]) -> Result:
        """Have each rank do its part; if one fails none goes on. Damage that any rank found is raised on all."""
        failure: Exception | None = None
        result: Result | None = None
        try:
            result = act()
        except Exception as error:
            failure = error
        own = _outcome(failure)
        worst = self._agreement.highest(own)
        if worst == _Outcome.FINE:
            return cast("Result", result)
        said = self._agreement.all_say(f"rank {self._ranks.rank}: {failure}" if own == worst else "")
        message = next(text for text in said if text)
        if worst == _Outcome.DAMAGED:
            raise CheckpointRejectedError(manifest_key(parent.generation, parent.step), message) from failure
        if worst == _Outcome.OBSTRUCTED:
            raise self._shared(failure)
        if isinstance(failure, StoreError):
            raise refusal(failure).error() from failure
        raise failure or CollectiveFailed(f"another rank could not restore: {message}")

    def _shared(self, failure: Exception | None) -> Exception:
        """The obstacle of the first rank that met one. Collective."""
        own = refusal(failure) if isinstance(failure, StoreError) else None
        return next(said for said in self._agreement.all_say(own) if said is not None).error()

    def _pass_over(self, rejected: str) -> None:
        """Enter the history anew, from the newest checkpoint that was not found damaged."""
        self._applicant = self._applicant.without(rejected)
        said = self._agreement.first_says(enter(self._store, self._applicant) if self._ranks.first else None)
        if isinstance(said, Refusal):
            raise said.error()
        assert said is not None
        self._entry = said

    def _make_saver(self) -> Saver:
        record = self._entry.record
        committer = Committer(self._store, record, self._config.checkpoint.retain) if self._ranks.first else None
        return Saver(self._store, record.generation, committer, self._group, self._environ)

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
        return _Verdict(self._agreement.highest(own if self._ranks.first else _Verdict.BEGIN))

    def _state(self) -> tuple[str | None, str | None]:
        """The key of the last manifest put, and why to stop: as rank 0 knows it."""
        if self._saver is None:
            return None, None
        ended = self._saver.ended
        key = manifest_key(ended.manifest.generation, ended.manifest.step) if ended and ended.manifest else None
        return key, self._saver.superseded


def _outcome(failure: Exception | None) -> _Outcome:
    if failure is None:
        return _Outcome.FINE
    if isinstance(failure, DAMAGED):
        return _Outcome.DAMAGED
    obstructed = isinstance(failure, StoreError) and in_the_way(failure) is not None
    return _Outcome.OBSTRUCTED if obstructed else _Outcome.FAILED


def _replicated(parallelism: Parallelism) -> bool:
    return parallelism.shard == "none" and parallelism.tensor == 1 and parallelism.pipeline == 1


def _background_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # this rank is a member, as all are
    return group
