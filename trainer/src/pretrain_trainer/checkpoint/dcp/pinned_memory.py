"""Host memory that a GPU copies to by itself: twice as fast as other memory, and without the CPU.

Staging memory is a mapped file (see `layout`), so it is registered where it is instead of being allocated anew, as
`torch.distributed.checkpoint` does with its shared staging memory. Where CUDA refuses, copies are slower and no less
right.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Protocol, cast

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_PORTABLE = 1


class Runtime(Protocol):
    """What is used of CUDA."""

    def register(self, address: int, size: int) -> int:
        """Pin memory; returns an error code, 0 for success."""
        ...

    def unregister(self, address: int) -> None:
        """Let go of it."""
        ...

    def wait(self, device: torch.device) -> None:
        """Until what was queued on the present stream of a device is done."""
        ...


class Cuda:
    """CUDA's runtime, through torch."""

    def register(self, address: int, size: int) -> int:
        """See Runtime. Takes back the error, which CUDA would report at whatever is asked of it next."""
        code = int(cast("Any", torch.cuda.cudart()).cudaHostRegister(address, size, _PORTABLE))
        if code:
            with suppress(RuntimeError):
                torch.zeros(1, device="cuda")
        return code

    def unregister(self, address: int) -> None:
        """See Runtime."""
        cast("Any", torch.cuda.cudart()).cudaHostUnregister(address)

    def wait(self, device: torch.device) -> None:
        """See Runtime."""
        torch.cuda.current_stream(device).synchronize()


CUDA: Runtime = Cuda()


class Pinned:
    """A mapped file's memory, pinned as long as this lives. It keeps the mapping: memory is unpinned before it goes."""

    def __init__(self, memory: Tensor, runtime: Runtime = CUDA) -> None:
        self._memory = memory
        code = runtime.register(memory.data_ptr(), memory.nbytes)
        if code:
            _log.warning("staging memory is not pinned: CUDA answers with error %d", code)
            return
        weakref.finalize(self, runtime.unregister, memory.data_ptr()).atexit = False


def gpus(tensors: Iterable[Tensor]) -> frozenset[torch.device]:
    """The GPUs that any of the tensors is on."""
    return frozenset(tensor.device for tensor in tensors if tensor.is_cuda)
