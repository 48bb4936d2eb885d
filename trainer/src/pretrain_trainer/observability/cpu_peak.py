"""Peak speed of a CPU, measured: the fastest of some matrix products in the run's own arithmetic and threads.

No vendor publishes it. It is measured once per machine, between two steps of a run that has completed some and finds no
earlier figure; later processes read the figure from a file, so no recovery waits for it. A figure measured on a busy
machine is too low: a run that exceeds it measures again, and the higher figure stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

PEAKS_FOLDER = "pretrain-peaks"
"""The folder of figures in the user's cache."""
SIZE = 512
"""Rows and columns of the matrices: large enough to reach the peak, small enough to lie in the cache."""
SECONDS = 0.06
"""Duration of the measurement, at least three products."""
READ_AFTER, MEASURED_AFTER = 2, 10
"""Steps of a process; its first ones are part of a recovery, and slow."""


@dataclass(frozen=True)
class CpuPeakKey:
    """Determinants of a CPU's peak."""

    cpu: str
    threads: int
    dtype: str
    torch: str = torch.__version__


class CpuPeak:
    """FLOP/s of this rank's share of the machine; `flops` is None until they are known.

    `ranks` is the number of processes that compute on this machine. Where they have more threads than there are CPUs,
    each gets a share.
    """

    def __init__(self, dtype: torch.dtype, ranks: int, folder: Path) -> None:
        self._dtype = dtype
        self._ranks = ranks
        self._folder = folder
        self._steps = 0
        self._doubted = False
        self.flops: float | None = None

    def step_done(self) -> None:
        """Count a step; read the figure, or measure it, at the steps for that."""
        if self.flops is not None:
            return
        self._steps += 1
        if self._steps not in (READ_AFTER, MEASURED_AFTER):
            return
        self._find(measure=self._steps == MEASURED_AFTER)

    def doubt(self) -> None:
        """Measure again, at most once: the run exceeded the peak."""
        if not self._doubted:
            self._doubted = True
            self._find(measure=True, again=True)

    def _find(self, *, measure: bool, again: bool = False) -> None:
        threads = torch.get_num_threads()
        key = CpuPeakKey(_model(), threads, str(self._dtype))
        file = self._folder / f"peak-{hashlib.sha256(json.dumps(asdict(key)).encode()).hexdigest()[:16]}.json"
        found = _read(file)
        if measure and (found is None or again):
            found = max(found or 0.0, measured(self._dtype))
            _write(file, key, found)
        if found is not None:
            self.flops = found * min(1.0, len(os.sched_getaffinity(0)) / (self._ranks * threads))


def _read(file: Path) -> float | None:
    try:
        return float(json.loads(file.read_text())["flops"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(file: Path, key: CpuPeakKey, flops: float) -> None:
    """Save the figure for later processes of this machine, if the folder is writable."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as draft:
            json.dump(asdict(key) | {"flops": flops}, draft)
        os.replace(draft.name, file)


@torch.no_grad()
def measured(dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest of several products of two SIZE x SIZE matrices."""
    left, right = (torch.ones(SIZE, SIZE, dtype=dtype) for _ in range(2))
    out = torch.empty(SIZE, SIZE, dtype=dtype)
    torch.mm(left, right, out=out)
    best, began, rounds = float("inf"), time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - began < SECONDS:
        before = time.perf_counter()
        torch.mm(left, right, out=out)
        best = min(best, time.perf_counter() - before)
        rounds += 1
    return 2 * SIZE**3 / best


def _model() -> str:
    with suppress(OSError), Path("/proc/cpuinfo").open() as file:
        for line in file:  # The file is long on machines with many CPUs: stop at the first name.
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
