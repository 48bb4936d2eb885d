"""Temporary folders that vanish with their process: for transfers to and from the store, and for states in memory.

A killed process cannot remove its folder. Each folder is therefore locked by its process, and creating a folder removes
those whose locks are free.
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
"""Variable with the agent's folder in memory, which outlives the ranks and is removed with the agent."""
MEMORY = Path("/dev/shm")
_NAME = "pretrain-scratch-"
_LOCK = "lock"
_GRACE_SECONDS = 60.0
"""Grace period for a folder without a lock: its process may still be creating it."""


class Scratch:
    """Folder of this process, removed on close or exit, or by another process after a kill."""

    def __init__(self, parent: Path) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=_NAME, dir=parent))
        unnamed = self.path / f"{_LOCK}.new"
        lock = os.open(unnamed, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        unnamed.rename(self.path / _LOCK)  # rename after locking, so that no other process sees an unlocked file
        self._remove = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    @classmethod
    def with_room(cls, size: int, environ: Mapping[str, str]) -> Scratch:
        """Create a folder in memory if it has room for twice `size` bytes, else in TMPDIR."""
        disk = Path(environ.get("TMPDIR") or "/tmp")
        in_memory = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2 * size
        parent = MEMORY if in_memory else disk
        remove_abandoned(parent)
        return cls(parent)

    @classmethod
    def beside(cls, parent: Path) -> Scratch | None:
        """Create a folder below `parent`, which is created too; None if that fails or locks are unsupported."""
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
        """Remove the folder with its contents. Mappings of its files stay valid."""
        self._remove()


def _remove(path: Path, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # a fork inherits this finaliser
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def remove_abandoned(parent: Path) -> None:
    """Remove the folders below `parent` whose processes have ended."""
    for folder in parent.glob(f"{_NAME}*"):
        if _abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _abandoned(folder: Path) -> bool:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        return _age(folder) > _GRACE_SECONDS
    except OSError:  # belongs to another user
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
