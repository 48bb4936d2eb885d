"""DCP's metadata is read as any Python 3.11 writes it, and nothing else is unpickled."""

from __future__ import annotations

import io
import pickle
from enum import Enum
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from pretrain_trainer.checkpoint.dcp.load import UnusableFiles, read_metadata


class EarlyPickler(pickle.Pickler):
    """Members of enumerations as Python 3.11.0 to 3.11.3 pickle them."""

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, Enum) else NotImplemented


class Payload:
    """Reduces to a look-up on something else than an enumeration."""

    def __reduce__(self) -> Any:
        return getattr, (torch.Size, "numel")


def written(value: object) -> bytes:
    stream = io.BytesIO()
    EarlyPickler(stream).dump(value)
    return stream.getvalue()


def test_metadata_that_an_early_python_3_11_wrote_is_read() -> None:
    chunk = ChunkStorageMetadata(offsets=torch.Size([0]), sizes=torch.Size([4]))
    saved = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([4]), [chunk])
    metadata = Metadata(state_dict_metadata={"weight": saved})

    content = written(metadata)

    assert b"getattr" in content
    assert read_metadata(content) == metadata


def test_no_other_attribute_can_be_looked_up() -> None:
    with pytest.raises(UnusableFiles, match="getattr is not allowed"):
        read_metadata(written(Payload()))
