"""Streaming sha256 of files and memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

_BLOCK = 1 << 20
"""Bytes read at once: a block that fits a core's cache is still there when it is digested and written."""


@dataclass(frozen=True)
class Digest:
    """Size in bytes, and sha256 in hex."""

    size: int
    sha256: str


def digested(source: FileIO, sink: Callable[[memoryview], object] | None = None) -> Digest:
    """Digest a file to its end, passing the same bytes to `sink`. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    size_now = os.fstat(source.fileno()).st_size  # 0 of a pipe as well
    block = memoryview(bytearray(min(_BLOCK, size_now or _BLOCK)))
    while count := source.readinto(block):
        digest.update(block[:count])
        if sink is not None:
            sink(block[:count])
        size += count
    return Digest(size, digest.hexdigest())


def read_into(source: FileIO, into: memoryview) -> Digest:
    """Fill memory with a file of its size, digesting the bytes in place. Raises OSError.

    A file of another size is not read: the digest has its size, and the sha256 of no bytes.
    """
    digest, done, size = hashlib.sha256(), 0, os.fstat(source.fileno()).st_size
    if size == len(into):
        while done < size and (count := source.readinto(into[done : done + _BLOCK])):
            digest.update(into[done : done + count])
            done += count
        size = done
    return Digest(size, digest.hexdigest())


def digest_of(path: Path) -> Digest:
    """Return the digest of a file. Raises OSError."""
    with path.open("rb", buffering=0) as source:
        return digested(source)
