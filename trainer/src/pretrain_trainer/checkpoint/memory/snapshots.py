"""Snapshots in the memory of a worker: copied at a step boundary, sealed with their digests by a thread.

A snapshot is a folder below that of the worker's agent, so it outlives ranks and generations and is gone with the
worker. Two are kept in turn: while one is overwritten, the one before it is whole. A folder counts only with its seal,
which is removed before the files change and put back, by a rename, when they have been digested. The step loop waits
for the copy, and at the beginning of the next step with a snapshot for the seal of the one before: all ranks pass the
collectives of that step after it, so there is always a step whose state is sealed on all of them.
"""

from __future__ import annotations

import hashlib
import mmap
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import Field, ValidationError
from torch import Tensor

from pretrain_api.base import Frozen
from pretrain_api.checkpoint.lineage import LineageRecord, LossMemory, MemoryState, SlowedRange, StepRange, StoredObject
from pretrain_api.messages.reports import StepDone
from pretrain_trainer.checkpoint.dcp.layout import Layout, LayoutSignature, copy_to_host, write_part_layout
from pretrain_trainer.core.progress import TrainingProgress

SEAL = "seal.json"
_PREFIX = "state-"
_SLOTS = 2
_SPARE = 1 << 20
"""Bytes for metadata, seals and the padding of files."""


@dataclass(frozen=True)
class StatePart:
    """Part `number` of `of` of the whole state. Replicated state has one part, which all processes have."""

    number: int
    of: int


class Seal(Frozen):
    """Proof that a folder holds a whole part of a state: the generation that made it, and the digests of its files."""

    state: MemoryState
    tokens: int = Field(ge=0)
    skipped: tuple[StepRange, ...] = ()
    slowed: tuple[SlowedRange, ...] = ()
    dropped: tuple[StepRange, ...] = ()
    watch: LossMemory = LossMemory()
    lately: tuple[StepDone, ...] = ()
    part: int = Field(ge=0)
    parts: int = Field(ge=1)
    objects: tuple[StoredObject, ...]

    @property
    def progress(self) -> TrainingProgress:
        """The progress of training in this state."""
        return TrainingProgress(
            self.state.step, self.tokens, self.skipped, self.slowed, self.dropped, self.watch, self.lately
        )


class InsufficientMemory(Exception):
    """The folder's memory has no room for the snapshots. The message names the room needed."""


class SnapshotWriter:
    """Writer of one process's snapshots in one generation."""

    def __init__(self, folder: Path, local_rank: int, record: LineageRecord, part: StatePart) -> None:
        self._folder = folder
        self.record = record
        """Lineage record of the generation that the snapshots belong to."""
        self._part = part
        self._mine = f"{_PREFIX}g{record.generation:06d}-{record.nonce[:8]}-"
        self._slots = tuple(folder / f"{self._mine}{local_rank}-{slot}" for slot in range(_SLOTS))
        self._layouts: dict[Path, Layout] = {}
        self._taken = 0
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def take(self, progress: TrainingProgress, tensors: Mapping[str, Tensor]) -> float:
        """Copy the tensors and have a thread seal the copy; return the seconds of the copy.

        Raises InsufficientMemory before anything is written, and the error that kept the last snapshot unsealed.
        """
        began = time.perf_counter()
        self.join()
        if self._taken == 1:  # the first is sealed everywhere: earlier generations' snapshots are obsolete
            self._remove_others()
        slot = self._slots[self._taken % _SLOTS]
        layout = self._layouts.pop(slot, None)
        if layout is not None and layout.signature == LayoutSignature.of(tensors):
            (slot / SEAL).unlink(missing_ok=True)
            layout.fill(tensors)
            make = partial(_same, layout)
        else:
            copies = copy_to_host(tensors)
            self._make_room(slot, sum(copy.nbytes for copy in copies.values()))
            make = partial(write_part_layout, slot, tensors, copies)
        self._taken += 1
        stall = time.perf_counter() - began
        self._thread = threading.Thread(target=self._finish, args=(slot, make, progress), name="snapshot", daemon=True)
        self._thread.start()
        return stall

    def settle(self) -> None:
        """Wait until the last snapshot is sealed or has failed."""
        if self._thread is not None:
            self._thread.join()

    def join(self) -> None:
        """Wait until the last snapshot is sealed; raise the error that kept it unsealed."""
        self.settle()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _finish(self, slot: Path, make: partial[Layout], progress: TrainingProgress) -> None:
        try:
            layout = make()
            self._layouts[slot] = layout
            seal = Seal(
                state=MemoryState(generation=self.record.generation, nonce=self.record.nonce, step=progress.step),
                tokens=progress.tokens,
                skipped=progress.skipped,
                slowed=progress.slowed,
                dropped=progress.dropped,
                watch=progress.watch,
                lately=progress.lately,
                part=self._part.number,
                parts=self._part.of,
                objects=tuple(stored_object(slot, name) for name in layout.files),
            )
            draft = slot / f"{SEAL}.new"
            draft.write_text(seal.to_json())
            draft.rename(slot / SEAL)
        except Exception as error:  # raised by the next call
            self._failure = error

    def _make_room(self, slot: Path, size: int) -> None:
        shutil.rmtree(slot, ignore_errors=True)
        free = shutil.disk_usage(self._folder).free
        if free < size + _SPARE:
            raise InsufficientMemory(
                f"{self._folder.parent} has room for {free:,} bytes and a state in memory takes {size:,}, "
                f"of which {_SLOTS} are kept: enlarge it, or leave checkpoint.memory out"
            )
        slot.mkdir(mode=0o700)

    def _remove_others(self) -> None:
        for folder in self._folder.glob(f"{_PREFIX}*"):
            if not folder.name.startswith(self._mine):
                shutil.rmtree(folder, ignore_errors=True)


def sealed_snapshots(folder: Path) -> Iterator[tuple[Path, Seal]]:
    """Yield the sealed snapshots in a worker's folder, each with its own folder. Their digests are not checked."""
    for path in sorted(folder.glob(f"{_PREFIX}*/{SEAL}")):
        try:
            yield path.parent, Seal.from_json(path.read_bytes())
        except (OSError, ValidationError):
            continue


def is_intact(folder: Path, seal: Seal) -> bool:
    """Verify the digests of the sealed files."""
    try:
        return all(stored_object(folder, item.key) == item for item in seal.objects)
    except (OSError, ValueError):  # gone, or empty
        return False


def remove_snapshots_except(folder: Path, keep: MemoryState | None) -> None:
    """Remove all snapshots of a worker's folder but one."""
    kept = {path for path, seal in sealed_snapshots(folder) if seal.state == keep}
    for path in set(folder.glob(f"{_PREFIX}*")) - kept:
        shutil.rmtree(path, ignore_errors=True)


def stored_object(folder: Path, name: str) -> StoredObject:
    """Return size and digest of a file, hashed in place: without copies the step loop keeps the interpreter."""
    with (folder / name).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return StoredObject(key=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _same(layout: Layout) -> Layout:
    return layout
