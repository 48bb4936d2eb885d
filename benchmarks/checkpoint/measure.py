"""One measurement in a process of its own, as a line of JSON: `python measure.py '{"what": …}'`. Started by run.py."""

from __future__ import annotations

import json
import mmap
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import limits
import torch
from torch.distributed.checkpoint.state_dict_saver import async_save
from work import Ours, Work

from pretrain_api.spec.job import S3Storage, Storage
from pretrain_trainer.checkpoint.dcp.state import tensors_of
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.ranks import Ranks, process_group

QUIET = 0.9
"""Share of the cores' time: what is left for others is a system's own work."""


@dataclass(frozen=True)
class Order:
    """What to measure. `where`: a folder, or the bucket of a service that the environment names."""

    what: str
    parameters: float
    rounds: int
    folder: str
    bucket: str
    patience: float
    """Seconds to wait, before each measurement of a bandwidth, for other programs to leave the cores alone."""


# --- bandwidth --------------------------------------------------------------------------------------------------------


def bandwidth(order: Order, ranks: Ranks) -> dict[str, Any]:
    """Seconds to save and to restore, ours and the plain way, in turns. The first save lays out and does not count."""
    work = Work(order.parameters)
    work.step()
    place = _Bucket(order) if order.what == "bandwidth s3" else _Folder(order)
    try:
        ours = Ours(place.storage, ranks)
        ours.begin(work)
        first = ours.finish()
        size = sum(path.stat().st_size for path in place.like_ours(work))
        rounds = []
        for number in range(order.rounds):
            timed = {}
            ways: list[tuple[str, Callable[[], float]]] = [
                ("plainSave", place.save_plainly),
                ("save", lambda: _saved(ours, work, place)),
                ("plainRestore", place.restore_plainly),
                ("restore", lambda: _restored(ours, order, place)),
            ]
            if number % 2:  # a machine that grows slower or faster favours neither
                ways = [ways[1], ways[0], ways[3], ways[2]]
            for name, act in ways:
                _touch(2 * size)
                timed[f"{name}Idle"] = _quiet(order.patience)
                cpu = _cpu()
                timed[name] = act()
                timed[f"{name}Cpu"] = _cpu() - cpu
            timed |= ours.stages
            rounds.append(timed)
    finally:
        place.close()
    return {"bytes": size, "firstSave": first, "rounds": rounds}


def _touch(size: int) -> None:
    """Have as much free memory as a way takes at hand: on a virtual machine the host may have taken back what was freed
    before, and whoever comes first would pay for it.
    """
    bytearray(size)[:: mmap.PAGESIZE] = bytes(-(-size // mmap.PAGESIZE))


def _quiet(patience: float) -> float:
    """Wait until the cores were idle for a second, but not for ever; returns the share of it that they were."""
    until = time.monotonic() + patience
    while True:
        before = _spent()
        time.sleep(1.0)
        idle, total = (now - then for now, then in zip(_spent(), before, strict=True))
        if idle >= QUIET * total or time.monotonic() > until:
            return idle / total


def _spent() -> tuple[int, int]:
    """Time of all cores, idle and in all."""
    spent = [int(part) for part in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return spent[3] + spent[4], sum(spent)


def _saved(ours: Ours, work: Work, place: _Folder | _Bucket) -> float:
    ours.begin(work)
    seconds = ours.finish()
    place.forget()
    return seconds


def _restored(ours: Ours, order: Order, place: _Folder | _Bucket) -> float:
    """Into a model whose memory has never been touched, as in a new process."""
    new = Work(order.parameters, initialised=False)
    checkpointer = ours.reopened()
    place.forget()
    began = time.perf_counter()
    checkpointer.restore(new.model, new.optimizer)
    seconds = time.perf_counter() - began
    ours.stages |= {f"restore {name}": spent for name, spent in checkpointer.seconds.items()}
    return seconds


class _Folder:
    """A folder on the disk that is measured."""

    def __init__(self, order: Order) -> None:
        self._path = Path(tempfile.mkdtemp(prefix="pretrain-bench-", dir=order.folder))
        self.storage = Storage(path=str(self._path / "ours"))
        self._data = bytearray()

    def like_ours(self, work: Work) -> list[Path]:
        """Take as much data as a checkpoint of ours has; its files."""
        files = [path for path in (self._path / "ours" / "checkpoints").rglob("*") if path.is_file()]
        self._data = bytearray(os.urandom(1 << 20) * (sum(path.stat().st_size for path in files) >> 20))
        return files

    def save_plainly(self) -> float:
        """To a new file beside the one before, which goes afterwards, as checkpoints do."""
        new = self._path / "plain.new"
        began = time.perf_counter()
        limits.write(new, memoryview(self._data))
        seconds = time.perf_counter() - began
        new.replace(self._path / "plain")
        self.forget()
        return seconds

    def restore_plainly(self) -> float:
        self.forget()
        began = time.perf_counter()
        limits.read(self._path / "plain")
        return time.perf_counter() - began

    def forget(self) -> None:
        limits.forget(self._path)

    def close(self) -> None:
        shutil.rmtree(self._path)


class _Bucket:
    """A bucket of an S3 service. Files to and from it are in memory."""

    def __init__(self, order: Order) -> None:
        self._plain = limits.PlainS3(os.environ, order.bucket)
        self._plain.make_bucket()
        self._prefix = f"pretrain-bench-{os.getpid()}"
        self.storage = Storage(
            s3=S3Storage(bucket=order.bucket, prefix=self._prefix, endpoint=os.environ["AWS_ENDPOINT_URL"])
        )
        self._memory = Path(tempfile.mkdtemp(prefix="pretrain-bench-", dir="/dev/shm"))

    def like_ours(self, work: Work) -> list[Path]:
        path = self._memory / "source"
        path.write_bytes(os.urandom(1 << 20) * (work.bytes >> 20))
        return [path]

    def save_plainly(self) -> float:
        began = time.perf_counter()
        self._plain.upload(self._memory / "source")
        return time.perf_counter() - began

    def restore_plainly(self) -> float:
        target = self._memory / "target"
        began = time.perf_counter()
        self._plain.download(target)
        seconds = time.perf_counter() - began
        target.unlink()
        return seconds

    def forget(self) -> None:
        """Nothing is cached here."""

    def close(self) -> None:
        shutil.rmtree(self._memory)
        self._plain.clear("plain")
        self._plain.clear(self._prefix)


# --- the step loop ----------------------------------------------------------------------------------------------------


class Way(Protocol):
    """A way to save. What `begin` takes, the step loop waits."""

    def begin(self, work: Work) -> None:
        """Begin to save."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        ...

    def finish(self) -> None:
        """Wait until it is done."""
        ...


class _OursBeside(Ours):
    @property
    def busy(self) -> bool:
        return self.generation._saver.step_in_flight is not None

    def finish(self) -> None:  # type: ignore[override]
        super().finish()


class _TorchSave:
    """All is done when it returns."""

    busy = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._saves = 0

    def begin(self, work: Work) -> None:
        self._saves += 1
        torch.save(tensors_of(work.model, work.optimizer), self._folder / f"{self._saves % 2}.pt")

    def finish(self) -> None: ...


class _DcpAsync:
    """With its defaults: a thread, and staging memory that is made anew."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._saves = 0
        self._future: Future[Any] | None = None

    def begin(self, work: Work) -> None:
        self._saves += 1
        target = self._folder / f"step-{self._saves}"
        self._future = cast(
            "Future[Any]", async_save(dict(tensors_of(work.model, work.optimizer)), checkpoint_id=str(target))
        )
        shutil.rmtree(self._folder / f"step-{self._saves - 2}", ignore_errors=True)

    @property
    def busy(self) -> bool:
        return self._future is not None and not self._future.done()

    def finish(self) -> None:
        if self._future is not None:
            self._future.result()


def beside(order: Order, ranks: Ranks) -> dict[str, Any]:
    """What a way of saving costs the step loop: the stall, the steps beside it, memory."""
    folder = Path(tempfile.mkdtemp(prefix="pretrain-bench-", dir=order.folder))
    bucket: _Bucket | None = None
    try:
        match order.what:
            case "beside ours, folder":
                way: Way = _OursBeside(Storage(path=str(folder)), ranks)
            case "beside ours, s3":
                bucket = _Bucket(order)
                way = _OursBeside(bucket.storage, ranks)
            case "beside torch.save":
                way = _TorchSave(folder)
            case _:
                way = _DcpAsync(folder)
        return _loop(Work(order.parameters), way, order.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if bucket is not None:
            bucket.close()


def _loop(work: Work, way: Way, rounds: int) -> dict[str, Any]:
    for _ in range(2):
        work.step()
    _reset_peak()
    _steps(work, 3)
    size, before = work.bytes, _peak()
    found: list[dict[str, Any]] = []
    for number in range(rounds + 1):  # the first one is told apart: it makes buffers and layouts
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
    """CPU seconds of this process. Those of steps can be taken off, since they use one thread."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The most memory that this process had since then, shared memory that it maps included; bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    order = Order(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    with process_group(Environment.of({})) as ranks:
        found = bandwidth(order, ranks) if order.what.startswith("bandwidth") else beside(order, ranks)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
