"""The sha256 of bytes on their way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

_BLOCK = 1 << 20
"""Fits the cache of a core: what was read is still there when it is digested, and when it is written."""


@dataclass(frozen=True)
class Digest:
    """Of so many bytes; `sha256` in hex."""

    size: int
    sha256: str


def digested(source: FileIO, sink: Callable[[memoryview], object] | None = None) -> Digest:
    """Read a file to its end; the `sink` gets the very bytes that the digest is of. Raises OSError."""
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
    """Fill memory with a file of its size, whose bytes are digested where they came to lie. Raises OSError.

    Of a file of another size nothing is read: the digest is that of no bytes.
    """
    digest, done, size = hashlib.sha256(), 0, os.fstat(source.fileno()).st_size
    if size == len(into):
        while done < size and (count := source.readinto(into[done : done + _BLOCK])):
            digest.update(into[done : done + count])
            done += count
        size = done
    return Digest(size, digest.hexdigest())


def digest_of(path: Path) -> Digest:
    """Of a file. Raises OSError."""
    with path.open("rb", buffering=0) as source:
        return digested(source)
