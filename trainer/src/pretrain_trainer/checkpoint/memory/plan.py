"""Choice of a snapshot in the memory of a new generation's workers: whether one is whole, and who has which part.

It is chosen and verified before the generation puts its lineage record, which names it. See docs/decisions/0015.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain_api.checkpoint.lineage import MemoryState
from pretrain_sdk.scratch import MEMORY_VARIABLE
from pretrain_trainer.checkpoint.memory.snapshots import Seal, is_intact, sealed_snapshots
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.ranks import Ranks


@dataclass(frozen=True)
class WorkerMemory:
    """Memory of this process's worker: its folder, None without one, and the processes that share it."""

    folder: Path | None
    first: int
    """Global rank of the worker's first process, which reports for it."""
    local_rank: int
    processes: int

    @classmethod
    def of(cls, ranks: Ranks, environ: Mapping[str, str]) -> WorkerMemory:
        """Return the memory that the environment describes."""
        local_rank = int(environ.get("LOCAL_RANK", "0"))
        folder = environ.get(MEMORY_VARIABLE)
        return cls(
            Path(folder) if folder else None,
            ranks.rank - local_rank,
            local_rank,
            int(environ.get("LOCAL_WORLD_SIZE", "1")),
        )

    @property
    def reports(self) -> bool:
        """True for the process that reports the content of the worker's memory."""
        return self.local_rank == 0

    def snapshots(self) -> tuple[tuple[Path, Seal], ...]:
        """Return the sealed snapshots in the memory."""
        return tuple(sealed_snapshots(self.folder)) if self.folder is not None else ()


@dataclass(frozen=True)
class MemoryInventory:
    """A process's report on its worker's memory; only the first process of a worker lists the seals."""

    worker: int
    seals: tuple[Seal, ...]


@dataclass(frozen=True)
class MemorySnapshot:
    """A whole state, and the workers (by their first ranks) that have each of its parts. Equal on all ranks."""

    progress: TrainingProgress
    state: MemoryState
    holders: tuple[tuple[int, ...], ...]
    workers: tuple[int, ...]
    """The worker of each rank."""

    @property
    def replicated(self) -> bool:
        """True if each part is the whole state."""
        return len(self.holders) == 1

    @property
    def everywhere(self) -> bool:
        """True if every worker has all parts."""
        return all(set(holders) == set(self.workers) for holders in self.holders)

    def ranks_with(self, part: int) -> tuple[int, ...]:
        """Return the ranks whose worker has this part."""
        return tuple(rank for rank, worker in enumerate(self.workers) if worker in self.holders[part])

    def without(self, damaged: Iterable[tuple[int, int]]) -> MemorySnapshot | None:
        """Return the snapshot without the damaged (worker, part) pairs; None when the rest is not whole."""
        gone = frozenset(damaged)
        holders = tuple(
            tuple(worker for worker in workers if (worker, part) not in gone)
            for part, workers in enumerate(self.holders)
        )
        if not all(holders):
            return None
        return MemorySnapshot(self.progress, self.state, holders, self.workers)


def choose_snapshot(
    inventories: Sequence[MemoryInventory], allowed: Callable[[MemoryState], bool]
) -> MemorySnapshot | None:
    """Choose the newest allowed state of which the workers together have all parts; `inventories` are by rank."""
    found: dict[MemoryState, dict[int, dict[int, Seal]]] = {}
    for inventory in inventories:
        for seal in inventory.seals:
            found.setdefault(seal.state, {}).setdefault(seal.part, {})[inventory.worker] = seal
    for state in sorted(found, key=lambda state: (state.generation, state.step), reverse=True):
        parts = found[state]
        one = next(iter(parts[min(parts)].values()))
        if set(parts) == set(range(one.parts)) and allowed(state):
            return MemorySnapshot(
                progress=one.progress,
                state=state,
                holders=tuple(tuple(sorted(parts[part])) for part in range(one.parts)),
                workers=tuple(inventory.worker for inventory in inventories),
            )
    return None


def find_damaged(memory: WorkerMemory, snapshot: MemorySnapshot) -> tuple[tuple[int, int], ...]:
    """Verify this process's share of the snapshot's parts; return the damaged (worker, part) pairs.

    The processes of a worker divide the work.
    """
    mine = [(path, seal) for path, seal in memory.snapshots() if seal.state == snapshot.state]
    return tuple(
        (memory.first, seal.part)
        for path, seal in mine
        if seal.part % memory.processes == memory.local_rank and not is_intact(path, seal)
    )
