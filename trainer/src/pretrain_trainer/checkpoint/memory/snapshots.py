"""States in the memory of a worker: copied at a step boundary, sealed with their digests by a thread.

A state is a folder below that of the worker's agent, so it outlives ranks and generations and is gone with the worker.
Two are kept in turn: while one is written over, the one before it is whole. A folder counts only by its seal, which is
taken away before the files change and put back, by a rename, when they have been digested. The step loop waits for the
copy, and at the beginning of the next step that has a snapshot for the seal of the one before: all ranks pass the
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
from pretrain_trainer.checkpoint.dcp.layout import Layout, Signature, lay_out_part, staged
from pretrain_trainer.core.progress import TrainingProgress

SEAL = "seal.json"
_PREFIX = "state-"
_SLOTS = 2
_SPARE = 1 << 20
"""Bytes for metadata, seals and the padding of files."""


@dataclass(frozen=True)
class Part:
    """Which part of the whole state a process has. Replicated state has one part, which all processes have."""

    number: int
    of: int


class Seal(Frozen):
    """What makes files in memory a part of a state: whose it is, and the digests of its files."""

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
        """How far training had come."""
        return TrainingProgress(
            self.state.step, self.tokens, self.skipped, self.slowed, self.dropped, self.watch, self.lately
        )


class NoRoom(Exception):
    """The folder's memory does not hold the states: says what would."""


class Snapshots:
    """Writes the states of one process in one generation."""

    def __init__(self, folder: Path, local_rank: int, record: LineageRecord, part: Part) -> None:
        self._folder = folder
        self.record = record
        """The generation's lineage record: a state belongs to it."""
        self._part = part
        self._mine = f"{_PREFIX}g{record.generation:06d}-{record.nonce[:8]}-"
        self._slots = tuple(folder / f"{self._mine}{local_rank}-{slot}" for slot in range(_SLOTS))
        self._layouts: dict[Path, Layout] = {}
        self._taken = 0
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def take(self, progress: TrainingProgress, tensors: Mapping[str, Tensor]) -> float:
        """Copy the tensors and have a thread seal the copy; returns the seconds that it took.

        Raises NoRoom before anything is written, and whatever kept the snapshot before it from being sealed.
        """
        began = time.perf_counter()
        self.join()
        if self._taken == 1:  # the first is sealed everywhere: what earlier generations left is not needed any more
            self._remove_others()
        slot = self._slots[self._taken % _SLOTS]
        layout = self._layouts.pop(slot, None)
        if layout is not None and layout.signature == Signature.of(tensors):
            (slot / SEAL).unlink(missing_ok=True)
            layout.fill(tensors)
            make = partial(_same, layout)
        else:
            copies = staged(tensors)
            self._make_room(slot, sum(copy.nbytes for copy in copies.values()))
            make = partial(lay_out_part, slot, tensors, copies)
        self._taken += 1
        stall = time.perf_counter() - began
        self._thread = threading.Thread(target=self._finish, args=(slot, make, progress), name="snapshot", daemon=True)
        self._thread.start()
        return stall

    def settle(self) -> None:
        """Wait until the last snapshot is sealed, or is known not to be."""
        if self._thread is not None:
            self._thread.join()

    def join(self) -> None:
        """The same; raises what kept it from being sealed."""
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
                objects=tuple(described(slot, name) for name in layout.files),
            )
            draft = slot / f"{SEAL}.new"
            draft.write_text(seal.to_json())
            draft.rename(slot / SEAL)
        except Exception as error:  # it is raised by the next call
            self._failure = error

    def _make_room(self, slot: Path, size: int) -> None:
        shutil.rmtree(slot, ignore_errors=True)
        free = shutil.disk_usage(self._folder).free
        if free < size + _SPARE:
            raise NoRoom(
                f"{self._folder.parent} has room for {free:,} bytes and a state in memory takes {size:,}, "
                f"of which {_SLOTS} are kept: enlarge it, or leave checkpoint.memory out"
            )
        slot.mkdir(mode=0o700)

    def _remove_others(self) -> None:
        for folder in self._folder.glob(f"{_PREFIX}*"):
            if not folder.name.startswith(self._mine):
                shutil.rmtree(folder, ignore_errors=True)


def sealed(folder: Path) -> Iterator[tuple[Path, Seal]]:
    """The states in a worker's folder that are sealed, each with its own folder. Their digests are not checked."""
    for path in sorted(folder.glob(f"{_PREFIX}*/{SEAL}")):
        try:
            yield path.parent, Seal.from_json(path.read_bytes())
        except (OSError, ValidationError):
            continue


def intact(folder: Path, seal: Seal) -> bool:
    """Whether the files are those that were sealed."""
    try:
        return all(described(folder, item.key) == item for item in seal.objects)
    except (OSError, ValueError):  # gone, or empty
        return False


def prune(folder: Path, keep: MemoryState | None) -> None:
    """Remove all states of a worker's folder but one."""
    kept = {path for path, seal in sealed(folder) if seal.state == keep}
    for path in set(folder.glob(f"{_PREFIX}*")) - kept:
        shutil.rmtree(path, ignore_errors=True)


def described(folder: Path, name: str) -> StoredObject:
    """Size and digest of a file, read where it is: hashing without copies leaves the interpreter to the step loop."""
    with (folder / name).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return StoredObject(key=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _same(layout: Layout) -> Layout:
    return layout
