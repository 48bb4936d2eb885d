"""Snapshot of a rank's memory when it is exhausted, written next to the rank's logs, or to the store without logs.

For a GPU it is the snapshot of torch's allocator (open it in https://pytorch.org/memory_viz), for a CPU a text: memory
of the process, limits, the largest tensors. Best effort: writing it may fail for lack of memory as well.
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from pretrain_api.spec.job import Storage
from pretrain_store.open import open_store
from pretrain_store.port import FEW_RETRIES
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.observability.memory import process_memory

LARGEST = 30
FOLDER = "memory/"
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.peak")


def write_snapshot(
    rank: int,
    generation: int,
    storage: Storage | None,
    environment: Environment,
    on_gpu: Callable[[], bool] = torch.cuda.is_initialized,
) -> str:
    """Write the snapshot and return its location; empty if that fails. Never raises."""
    try:
        gpu = on_gpu()
        name = f"rank{rank}-memory.{'pickle' if gpu else 'txt'}"
        path = (environment.logs or environment.scratch) / name
        path.write_bytes(_allocator() if gpu else describe().encode())
        if environment.logs or storage is None:
            return str(path)
        store, key = open_store(storage, environment.variables, FEW_RETRIES), f"{FOLDER}g{generation:06d}/{name}"
        store.put_file(key, path)
        path.unlink()
        return f"{storage.path or store.describe()}/{key}"
    except Exception:  # The error that ends this rank matters more.
        return ""


def describe() -> str:
    """Describe the process's memory, its limits, and its largest tensors, each storage once, largest first."""
    use = process_memory()
    lines = [f"process: {_mib(use.bytes)} resident, at most {_mib(use.peak_bytes)}"]
    lines += [f"{path}: {text}" for path in _LIMITS if (text := _read(path))]
    found = sorted(_tensors(), key=lambda item: -item[0])
    lines.append(f"tensors: {len(found)} storages, {_mib(sum(size for size, _ in found))} in all; the largest:")
    return "\n".join([*lines, *(f"  {_mib(size):>12}  {what}" for size, what in found[:LARGEST])]) + "\n"


def _tensors() -> Iterator[tuple[int, str]]:
    """Yield (bytes of a storage, description of one of its tensors)."""
    seen: set[int] = set()
    for item in gc.get_objects():
        if not issubclass(type(item), torch.Tensor) or item.device.type != "cpu":
            continue
        for tensor in (item, item.grad if item.is_leaf else None):
            if tensor is None or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                dtype = str(tensor.dtype).removeprefix("torch.")
                yield storage.nbytes(), f"{type(tensor).__name__} {tuple(tensor.shape)} {dtype}"


def _allocator() -> bytes:
    return pickle.dumps(torch.cuda.memory._snapshot())


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
