"""A state in the memory of a new generation's workers: whether there is a whole one, who has which part, loading it.

It is chosen and verified before the generation puts its lineage record, which names it. See docs/decisions/0015.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain_api.checkpoint.lineage import MemoryState
from pretrain_sdk.scratch import MEMORY_VARIABLE
from pretrain_trainer.checkpoint.memory.snapshots import Seal, intact, sealed
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.ranks import Ranks


@dataclass(frozen=True)
class Worker:
    """This process's worker: the folder in its memory, None without one, and who shares it."""

    folder: Path | None
    first: int
    """The global rank of its first process, which speaks for it."""
    local_rank: int
    processes: int

    @classmethod
    def of(cls, ranks: Ranks, environ: Mapping[str, str]) -> Worker:
        """The worker that the environment describes."""
        local_rank = int(environ.get("LOCAL_RANK", "0"))
        folder = environ.get(MEMORY_VARIABLE)
        return cls(
            Path(folder) if folder else None,
            ranks.rank - local_rank,
            local_rank,
            int(environ.get("LOCAL_WORLD_SIZE", "1")),
        )

    @property
    def speaks(self) -> bool:
        """Whether this process says what is in the worker's memory."""
        return self.local_rank == 0

    def found(self) -> tuple[tuple[Path, Seal], ...]:
        """The states in its memory."""
        return tuple(sealed(self.folder)) if self.folder is not None else ()


@dataclass(frozen=True)
class Account:
    """What a process says of its worker's memory; only the first one of each says what is in it."""

    worker: int
    seals: tuple[Seal, ...]


@dataclass(frozen=True)
class Recall:
    """A whole state, and the workers (by their first ranks) that have each of its parts. Equal on all ranks."""

    progress: TrainingProgress
    state: MemoryState
    holders: tuple[tuple[int, ...], ...]
    workers: tuple[int, ...]
    """The worker of each rank."""

    @property
    def replicated(self) -> bool:
        """Whether each part is the whole."""
        return len(self.holders) == 1

    @property
    def everywhere(self) -> bool:
        """Whether every worker has all of it."""
        return all(set(holders) == set(self.workers) for holders in self.holders)

    def ranks_with(self, part: int) -> tuple[int, ...]:
        """The ranks on whose worker this part is."""
        return tuple(rank for rank, worker in enumerate(self.workers) if worker in self.holders[part])

    def without(self, damaged: Iterable[tuple[int, int]]) -> Recall | None:
        """What is left without the (worker, part) pairs that are damaged; None when that is not whole."""
        gone = frozenset(damaged)
        holders = tuple(
            tuple(worker for worker in workers if (worker, part) not in gone)
            for part, workers in enumerate(self.holders)
        )
        if not all(holders):
            return None
        return Recall(self.progress, self.state, holders, self.workers)


def choose(accounts: Sequence[Account], allowed: Callable[[MemoryState], bool]) -> Recall | None:
    """The newest state that is allowed and of which the workers together have all parts; `accounts` are by rank."""
    found: dict[MemoryState, dict[int, dict[int, Seal]]] = {}
    for said in accounts:
        for seal in said.seals:
            found.setdefault(seal.state, {}).setdefault(seal.part, {})[said.worker] = seal
    for state in sorted(found, key=lambda state: (state.generation, state.step), reverse=True):
        parts = found[state]
        one = next(iter(parts[min(parts)].values()))
        if set(parts) == set(range(one.parts)) and allowed(state):
            return Recall(
                progress=one.progress,
                state=state,
                holders=tuple(tuple(sorted(parts[part])) for part in range(one.parts)),
                workers=tuple(said.worker for said in accounts),
            )
    return None


def damaged(worker: Worker, recall: Recall) -> tuple[tuple[int, int], ...]:
    """The (worker, part) pairs of the state that are not what was sealed, of those that this process is to check.

    The processes of a worker share the work.
    """
    mine = [(path, seal) for path, seal in worker.found() if seal.state == recall.state]
    return tuple(
        (worker.first, seal.part)
        for path, seal in mine
        if seal.part % worker.processes == worker.local_rank and not intact(path, seal)
    )
