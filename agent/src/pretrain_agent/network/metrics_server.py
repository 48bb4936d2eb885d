"""Endpoint of the worker for Prometheus and the kubelet: /metrics and /healthz."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pretrain_api.messages.reports import MemoryUse, Progress, ReportBody, Restored, Saved, StepDone
from pretrain_api.status.metrics import Family
from pretrain_api.status.records import parts_of

RANK = ("local_rank",)
SAVE_STAGES = ("copy", "upload", "agree", "commit")
STEP = Family("pretrain_worker_step", "gauge", "Steps completed", "steps")
STEP_SECONDS = Family(
    "pretrain_worker_step_seconds",
    "histogram",
    "Duration of a step, measured by the worker's first rank",
    "seconds",
    (),
    (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 30, 60, 120),
)
PARTS = Family(
    "pretrain_worker_step_part_seconds_total",
    "counter",
    "Time of steps by part: data (data wait), compute (forward and backward), reduce (all-reduce wait), optimizer, "
    "stall (checkpoint stall), other",
    "seconds",
    (*RANK, "part"),
)
DATA_WAIT = Family("pretrain_worker_data_wait_seconds_total", "counter", "Data wait of steps", "seconds", RANK)
LOSS = Family(
    "pretrain_worker_loss_contribution",
    "gauge",
    "Contribution of the rank's data to the loss of the last step; all ranks' contributions add up to the loss",
    "nats/token",
    RANK,
)
MEMORY = Family("pretrain_worker_memory_bytes", "gauge", "Resident memory of the rank's process", "bytes", RANK)
PEAK_MEMORY = Family(
    "pretrain_worker_memory_peak_bytes", "gauge", "Peak resident memory of the rank's process", "bytes", RANK
)
DEVICE_MEMORY = Family(
    "pretrain_worker_device_memory_bytes",
    "gauge",
    "Memory of the rank's accelerator: used, peak (maximum used so far), reserved (held by torch's allocator)",
    "bytes",
    (*RANK, "kind"),
)
ALLOC_RETRIES = Family(
    "pretrain_worker_alloc_retries_total",
    "counter",
    "Allocations on the rank's accelerator that succeeded only after freeing cached memory: it is nearly out of memory",
    "allocations",
    RANK,
)
SAVE_SECONDS = Family(
    "pretrain_worker_save_seconds",
    "histogram",
    "Duration of each stage of a checkpoint that this worker committed: copy, upload, agree, commit",
    "seconds",
    ("stage",),
    (0.01, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
RESTORE_SECONDS = Family(
    "pretrain_worker_restore_seconds",
    "histogram",
    "Duration of each stage from the start of rank 0 to the restored state",
    "seconds",
    ("stage",),
    (0.01, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
GENERATION = Family("pretrain_worker_generation", "gauge", "Generation whose ranks run here; 0: none")
DROPPED = Family(
    "pretrain_worker_reports_dropped_total",
    "counter",
    "Step reports dropped because nothing read them in time",
    "reports",
)
RESTARTS = Family(
    "pretrain_worker_restarts_total",
    "counter",
    "Starts of ranks by the reason of their generation",
    "starts",
    ("reason",),
)
CONNECTED = Family("pretrain_worker_connected", "gauge", "1 while the agent is connected to the coordinator")

FAMILIES = (
    STEP, STEP_SECONDS, PARTS, DATA_WAIT, LOSS, MEMORY, PEAK_MEMORY, DEVICE_MEMORY, ALLOC_RETRIES, SAVE_SECONDS,
    RESTORE_SECONDS, GENERATION, DROPPED, RESTARTS, CONNECTED,
)  # fmt: skip


class WorkerMetrics:
    """The metrics of one worker."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.generation = Gauge(*GENERATION.declaration, registry=registry)
        self.dropped = Counter(*DROPPED.declaration, registry=registry)
        self.restarts = Counter(*RESTARTS.declaration, registry=registry)
        self.connected = Gauge(*CONNECTED.declaration, registry=registry)
        self._step = Gauge(*STEP.declaration, registry=registry)
        self._step_seconds = Histogram(*STEP_SECONDS.declaration, buckets=STEP_SECONDS.buckets, registry=registry)
        self._parts = Counter(*PARTS.declaration, registry=registry)
        self._data_wait = Counter(*DATA_WAIT.declaration, registry=registry)
        self._loss = Gauge(*LOSS.declaration, registry=registry)
        self._memory = Gauge(*MEMORY.declaration, registry=registry)
        self._peak_memory = Gauge(*PEAK_MEMORY.declaration, registry=registry)
        self._device_memory = Gauge(*DEVICE_MEMORY.declaration, registry=registry)
        self._alloc_retries = Counter(*ALLOC_RETRIES.declaration, registry=registry)
        self._retries_before: dict[int, int] = {}
        """Allocation retries that each rank last reported."""
        self._save_seconds = Histogram(*SAVE_SECONDS.declaration, buckets=SAVE_SECONDS.buckets, registry=registry)
        for stage in SAVE_STAGES:  # Start at zero: a series that appears with its first value has no rate.
            self._save_seconds.labels(stage)
        self._restore_seconds = Histogram(
            *RESTORE_SECONDS.declaration, buckets=RESTORE_SECONDS.buckets, registry=registry
        )

    def rank_started(self, local_rank: int, pid: int) -> None:
        """Record the process of a rank that started."""
        self._memory.labels(local_rank).set_function(lambda: resident_bytes(pid))
        self._peak_memory.labels(local_rank).set_function(lambda: peak_resident_bytes(pid))
        self._retries_before[local_rank] = 0

    def ranks_gone(self) -> None:
        """Clear the gauges of ranks: none runs here now."""
        self.generation.set(0)
        for gauge in (self._loss, self._memory, self._peak_memory, self._device_memory):
            gauge.clear()

    def record(self, local_rank: int, body: ReportBody) -> None:
        """Record a report of a rank."""
        match body:
            case StepDone() | Progress():
                self._step_done(local_rank, body)
            case Saved():
                for stage, seconds in body.stages.items():
                    self._save_seconds.labels(stage).observe(seconds)
            case Restored():
                for stage, seconds in body.seconds.items():
                    self._restore_seconds.labels(stage).observe(seconds)
            case _:
                pass

    def _step_done(self, local_rank: int, done: StepDone | Progress) -> None:
        self._step.set(done.step)
        self._data_wait.labels(local_rank).inc(done.data_seconds)
        for part, seconds in parts_of(done).items():
            self._parts.labels(local_rank, part).inc(seconds)
        if local_rank == 0:
            self._step_seconds.observe(done.seconds)
        if done.loss_contribution is not None:
            self._loss.labels(local_rank).set(done.loss_contribution)
        if done.memory is not None and done.memory.reserved_bytes is not None:
            self._accelerator(local_rank, done.memory, done.memory.reserved_bytes)

    def _accelerator(self, local_rank: int, memory: MemoryUse, reserved: int) -> None:
        for kind, value in (("used", memory.bytes), ("peak", memory.peak_bytes), ("reserved", reserved)):
            self._device_memory.labels(local_rank, kind).set(value)
        before = self._retries_before.get(local_rank, 0)
        self._alloc_retries.labels(local_rank).inc(max(0, memory.alloc_retries - before))
        self._retries_before[local_rank] = memory.alloc_retries


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process; 0 if it is gone."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes(pid: int) -> int:
    """Return the peak resident memory of a process; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(found.split()[1]) * 1024 if found else 0


def http_address(host: str) -> str | None:
    """Return the address to serve on for a worker that others reach at `host`.

    A loopback address stays private. Any other worker serves on all addresses (None): `kubectl port-forward` uses the
    pod's loopback address.
    """
    return host if host in ("127.0.0.1", "::1", "localhost") else None


async def serve_http(host: str | None, port: int, metrics: WorkerMetrics, healthy: Callable[[], bool]) -> web.AppRunner:
    """Serve until the runner's cleanup. Port 0 picks a free port: see `runner.addresses`."""

    async def show_metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def show_health(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if healthy() else web.Response(text="torchrun thread ended\n", status=500)

    application = web.Application()
    application.add_routes([web.get("/metrics", show_metrics), web.get("/healthz", show_health)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
