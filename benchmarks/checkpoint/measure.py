"""One measurement in its own process, started by run.py: `python measure.py '{"what": …}'` prints a line of JSON."""

from __future__ import annotations

import json
import mmap
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from places import BucketPlace, FolderPlace, Measurement
from variants import DcpAsync, OursAsync, SaveVariant, TorchSave
from work import Ours, Work

from pretrain_api.spec.job import Storage
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.ranks import Ranks, process_group

QUIET = 0.9
"""Minimum idle share of the cores: the rest is the system's own work."""


# --- bandwidth --------------------------------------------------------------------------------------------------------


def bandwidth(measurement: Measurement, ranks: Ranks) -> dict[str, Any]:
    """Measure seconds to save and restore, ours and plain, in turns. The first save is a warm-up."""
    work = Work(measurement.parameters)
    work.step()
    place = BucketPlace(measurement) if measurement.what == "bandwidth s3" else FolderPlace(measurement)
    try:
        ours = Ours(place.storage, ranks)
        ours.begin(work)
        first = ours.finish()
        size = sum(path.stat().st_size for path in place.like_ours(work))
        rounds = []
        for number in range(measurement.rounds):
            timed = {}
            ways: list[tuple[str, Callable[[], float]]] = [
                ("plainSave", place.save_plainly),
                ("save", lambda: _saved(ours, work, place)),
                ("plainRestore", place.restore_plainly),
                ("restore", lambda: _restored(ours, measurement, place)),
            ]
            if number % 2:  # alternate, so that drift of the machine favours neither
                ways = [ways[1], ways[0], ways[3], ways[2]]
            for name, act in ways:
                _touch(2 * size)
                timed[f"{name}Idle"] = _quiet(measurement.patience)
                cpu = _cpu()
                timed[name] = act()
                timed[f"{name}Cpu"] = _cpu() - cpu
            timed |= ours.stages
            rounds.append(timed)
    finally:
        place.close()
    return {"bytes": size, "firstSave": first, "rounds": rounds}


def _touch(size: int) -> None:
    """Touch as much memory as a save takes: a hypervisor may have reclaimed it, which slows down the first user."""
    bytearray(size)[:: mmap.PAGESIZE] = bytes(-(-size // mmap.PAGESIZE))


def _quiet(patience: float) -> float:
    """Wait until the cores are idle for a second, at most `patience` seconds; return the idle share."""
    until = time.monotonic() + patience
    while True:
        before = _spent()
        time.sleep(1.0)
        idle, total = (now - then for now, then in zip(_spent(), before, strict=True))
        if idle >= QUIET * total or time.monotonic() > until:
            return idle / total


def _spent() -> tuple[int, int]:
    """Return idle and total time of all cores."""
    spent = [int(part) for part in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return spent[3] + spent[4], sum(spent)


def _saved(ours: Ours, work: Work, place: FolderPlace | BucketPlace) -> float:
    ours.begin(work)
    seconds = ours.finish()
    place.drop_caches()
    return seconds


def _restored(ours: Ours, measurement: Measurement, place: FolderPlace | BucketPlace) -> float:
    """Restore into a model with untouched memory, as in a new process."""
    new = Work(measurement.parameters, initialised=False)
    checkpointer = ours.reopened()
    place.drop_caches()
    began = time.perf_counter()
    checkpointer.restore(new.model, new.optimizer)
    seconds = time.perf_counter() - began
    ours.stages |= {f"restore {name}": spent for name, spent in checkpointer.seconds.items()}
    return seconds


# --- the step loop ----------------------------------------------------------------------------------------------------


def beside(measurement: Measurement, ranks: Ranks) -> dict[str, Any]:
    """Measure the cost of saving for the step loop: stall, slower steps, memory."""
    folder = Path(tempfile.mkdtemp(prefix="pretrain-bench-", dir=measurement.folder))
    bucket: BucketPlace | None = None
    try:
        match measurement.what:
            case "beside ours, folder":
                way: SaveVariant = OursAsync(Storage(path=str(folder)), ranks)
            case "beside ours, s3":
                bucket = BucketPlace(measurement)
                way = OursAsync(bucket.storage, ranks)
            case "beside torch.save":
                way = TorchSave(folder)
            case _:
                way = DcpAsync(folder)
        return _loop(Work(measurement.parameters), way, measurement.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if bucket is not None:
            bucket.close()


def _loop(work: Work, way: SaveVariant, rounds: int) -> dict[str, Any]:
    for _ in range(2):
        work.step()
    _reset_peak()
    _steps(work, 3)
    size, before = work.bytes, _peak()
    found: list[dict[str, Any]] = []
    for number in range(rounds + 1):  # the first save is reported separately: it allocates buffers and plans layouts
        plain = _steps(work, 5)
        _reset_peak()
        cpu = _cpu()
        stall = _timed(lambda: way.begin(work))
        steps: list[float] = []
        while way.busy:
            steps.append(_timed(work.step))
        way.finish()
        cpu = _cpu() - cpu
        ordinary = statistics.median(plain)
        found.append(
            {
                "first": number == 0,
                "step": ordinary,
                "stall": stall,
                "beside": statistics.mean(steps) / ordinary if steps else None,
                "stepsBeside": len(steps),
                "lost": stall + sum(steps) - len(steps) * ordinary,
                "cpu": cpu - len(steps) * ordinary,
                "memory": (_peak() - before) / size,
            }
        )
    return {"bytes": size, "rounds": found}


def _steps(work: Work, count: int) -> list[float]:
    return [_timed(work.step) for _ in range(count)]


def _timed(act: Callable[[], None]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _cpu() -> float:
    """Return the CPU seconds of this process. Steps use one thread, so their share can be subtracted."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Return the peak memory in bytes since `_reset_peak`, including mapped shared memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    measurement = Measurement(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    with process_group(Environment.of({})) as ranks:
        found = (
            bandwidth(measurement, ranks) if measurement.what.startswith("bandwidth") else beside(measurement, ranks)
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
