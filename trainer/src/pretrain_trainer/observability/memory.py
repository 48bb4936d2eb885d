"""How much memory a rank uses."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import torch

from pretrain_api.messages.reports import MemoryUse

_PAGE = os.sysconf("SC_PAGE_SIZE")


def accelerator_memory(device: torch.device) -> MemoryUse | None:
    """Of the accelerator, as torch's caching allocator counts it; None without one. Waits for nothing."""
    if device.type != "cuda":
        return None
    # Nested: flattening the counters, as torch.cuda.memory_stats does, takes longer than asking for them.
    return from_counters(torch.cuda.memory_stats_as_nested_dict(device))


def from_counters(counters: dict[str, Any]) -> MemoryUse:
    """What the allocator's nested counters say."""
    allocated, reserved = counters["allocated_bytes"]["all"], counters["reserved_bytes"]["all"]
    return MemoryUse(
        bytes=allocated["current"],
        peak_bytes=allocated["peak"],
        reserved_bytes=reserved["current"],
        alloc_retries=counters["num_alloc_retries"],
    )


def process_memory() -> MemoryUse:
    """Resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    statm = Path("/proc/self/statm")
    now = int(statm.read_text().split()[1]) * _PAGE if statm.exists() else peak
    return MemoryUse(bytes=now, peak_bytes=max(now, peak))  # The kernel brings its maximum up to date now and then.
