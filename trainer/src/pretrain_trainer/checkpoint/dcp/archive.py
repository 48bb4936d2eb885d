"""Reading `torch.save` archives in place: offsets of tensor bytes, without unpickling."""

from __future__ import annotations

from io import SEEK_CUR, SEEK_END, SEEK_SET, BytesIO, IOBase, RawIOBase
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.utils import _create_file_view

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

ALIGNMENT = 64
"""Bytes that each tensor's offset in its file is a multiple of."""
_SMALL = 1 << 20
"""Archives up to this size are read whole before parsing: a view costs 25 calls of Python each."""


class MemoryFile(RawIOBase):
    """Memory as a read-only file, without a copy."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = SEEK_SET, /) -> int:
        """Move to an offset, possibly beyond the end."""
        begin = {SEEK_SET: 0, SEEK_CUR: self._at, SEEK_END: len(self._content)}[whence]
        self._at = max(0, begin + offset)
        return self._at

    def readinto(self, into: WriteableBuffer, /) -> int:
        """Copy the next bytes; return their number."""
        target = memoryview(into)
        found = self._content[self._at : self._at + len(target)]
        target[: len(found)] = found
        self._at += len(found)
        return len(found)

    def close(self) -> None:
        """Release the memory."""
        self._content.release()
        super().close()


def data_offset(file: BinaryIO | MemoryFile, info: _StorageInfo) -> int:
    """Return the offset in the file of the bytes of the tensor in one of its `torch.save` archives."""
    archive: Any = torch._C.PyTorchFileReader
    view: object = _create_file_view(cast("IOBase", file), info.offset, info.length)
    if info.length <= _SMALL:
        file.seek(info.offset)
        view = BytesIO(file.read(info.length))
    return info.offset + archive(view).get_record_offset("data/0")
