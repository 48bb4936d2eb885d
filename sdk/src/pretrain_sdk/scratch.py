"""Folders that are gone when their process is: for files on their way to or from the store, and for states in memory.

A process that is killed cannot remove its folder, so each one holds a lock as long as it lives, and whoever makes the
next folder removes those whose locks are free.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Self

MEMORY_VARIABLE = "PRETRAIN_MEMORY"
"""Where the ranks of a worker find the folder in memory that is their agent's: it outlives them and goes with it."""
MEMORY = Path("/dev/shm")
_NAME = "pretrain-scratch-"
_LOCK = "lock"
_GRACE_SECONDS = 60.0
"""So long a folder may be without a lock: its process is just making it."""


class Scratch:
    """A folder of this process alone, removed when it is closed or the process ends, or by others if it is killed."""

    def __init__(self, parent: Path) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=_NAME, dir=parent))
        unnamed = self.path / f"{_LOCK}.new"
        lock = os.open(unnamed, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        unnamed.rename(self.path / _LOCK)  # only now, lest others see it without being locked
        self._remove = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    @classmethod
    def with_room(cls, size: int, environ: Mapping[str, str]) -> Scratch:
        """A folder in memory when that has room for twice `size` bytes, else in TMPDIR."""
        disk = Path(environ.get("TMPDIR") or "/tmp")
        in_memory = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2 * size
        parent = MEMORY if in_memory else disk
        remove_abandoned(parent)
        return cls(parent)

    @classmethod
    def beside(cls, parent: Path) -> Scratch | None:
        """A folder below `parent`, which is made; None where that cannot be, or has no locks."""
        try:
            parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(parent)
            return cls(parent)
        except OSError:
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder and all in it. Mappings of its files stay usable."""
        self._remove()


def _remove(path: Path, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # a fork that ends has inherited this
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def remove_abandoned(parent: Path) -> None:
    """Remove the folders below `parent` whose processes are gone."""
    for folder in parent.glob(f"{_NAME}*"):
        if _abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _abandoned(folder: Path) -> bool:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        return _age(folder) > _GRACE_SECONDS
    except OSError:  # another user's
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(lock)


def _age(folder: Path) -> float:
    try:
        return time.time() - folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0
