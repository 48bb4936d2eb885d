"""Memory use of a rank."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import torch

from pretrain_api.messages.reports import MemoryUse

_PAGE = os.sysconf("SC_PAGE_SIZE")


def accelerator_memory(device: torch.device) -> MemoryUse | None:
    """Return the use of the accelerator as torch's caching allocator counts it; None without one. Does not block."""
    if device.type != "cuda":
        return None
    # Nested: torch.cuda.memory_stats spends more time on flattening the counters than on reading them.
    return from_counters(torch.cuda.memory_stats_as_nested_dict(device))


def from_counters(counters: dict[str, Any]) -> MemoryUse:
    """Translate the allocator's nested counters."""
    allocated, reserved = counters["allocated_bytes"]["all"], counters["reserved_bytes"]["all"]
    return MemoryUse(
        bytes=allocated["current"],
        peak_bytes=allocated["peak"],
        reserved_bytes=reserved["current"],
        alloc_retries=counters["num_alloc_retries"],
    )


def process_memory() -> MemoryUse:
    """Return the resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    statm = Path("/proc/self/statm")
    now = int(statm.read_text().split()[1]) * _PAGE if statm.exists() else peak
    return MemoryUse(bytes=now, peak_bytes=max(now, peak))  # The kernel updates its maximum lazily.
