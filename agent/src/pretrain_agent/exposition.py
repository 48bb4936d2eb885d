"""What this worker tells Prometheus and the kubelet: /metrics and /healthz."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pretrain_api.metrics import Family
from pretrain_api.reports import Progress, ReportBody, Restored, Saved, StepDone

RANK = ("local_rank",)
SAVE_STAGES = ("copy", "upload", "agree", "commit")
STEP = Family("pretrain_worker_step", "gauge", "Steps completed", "steps")
STEP_SECONDS = Family(
    "pretrain_worker_step_seconds",
    "histogram",
    "Duration of a step, as the first of this worker's ranks saw it",
    "seconds",
    (),
    (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 30, 60, 120),
)
DATA_WAIT = Family(
    "pretrain_worker_data_wait_seconds_total", "counter", "Time that steps waited for data", "seconds", RANK
)
LOSS = Family(
    "pretrain_worker_loss_contribution",
    "gauge",
    "What the rank's data added to the last step's loss: those of all ranks of the job sum up to it",
    "nats/token",
    RANK,
)
MEMORY = Family("pretrain_worker_memory_bytes", "gauge", "Resident memory of the rank's process", "bytes", RANK)
DEVICE_MEMORY = Family(
    "pretrain_worker_device_memory_bytes", "gauge", "Most memory of its accelerator that the rank used", "bytes", RANK
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
    "Duration of each stage from the start of rank 0 to a state that stands",
    "seconds",
    ("stage",),
    (0.01, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
GENERATION = Family("pretrain_worker_generation", "gauge", "Generation whose ranks run here, 0: none")
DROPPED = Family(
    "pretrain_worker_reports_dropped_total", "counter", "Reports of steps lost for want of a reader", "reports"
)
RESTARTS = Family(
    "pretrain_worker_restarts_total", "counter", "Starts of ranks, by the generation's reason", "starts", ("reason",)
)
CONNECTED = Family("pretrain_worker_connected", "gauge", "1 while the coordinator knows this agent")

FAMILIES = (
    STEP, STEP_SECONDS, DATA_WAIT, LOSS, MEMORY, DEVICE_MEMORY, SAVE_SECONDS, RESTORE_SECONDS, GENERATION, DROPPED,
    RESTARTS, CONNECTED,
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
        self._data_wait = Counter(*DATA_WAIT.declaration, registry=registry)
        self._loss = Gauge(*LOSS.declaration, registry=registry)
        self._memory = Gauge(*MEMORY.declaration, registry=registry)
        self._device_memory = Gauge(*DEVICE_MEMORY.declaration, registry=registry)
        self._save_seconds = Histogram(*SAVE_SECONDS.declaration, buckets=SAVE_SECONDS.buckets, registry=registry)
        for stage in SAVE_STAGES:  # From zero on: what appears with its first value has no rate.
            self._save_seconds.labels(stage)
        self._restore_seconds = Histogram(
            *RESTORE_SECONDS.declaration, buckets=RESTORE_SECONDS.buckets, registry=registry
        )

    def rank_started(self, local_rank: int, pid: int) -> None:
        """A rank's process runs."""
        self._memory.labels(local_rank).set_function(lambda: resident_bytes(pid))

    def ranks_gone(self) -> None:
        """No rank runs here now: what was true of them is no more."""
        self.generation.set(0)
        for gauge in (self._loss, self._memory, self._device_memory):
            gauge.clear()

    def heard(self, local_rank: int, body: ReportBody) -> None:
        """A rank said so."""
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
        if local_rank == 0:
            self._step_seconds.observe(done.seconds)
        if done.loss_contribution is not None:
            self._loss.labels(local_rank).set(done.loss_contribution)
        if done.device_bytes is not None:
            self._device_memory.labels(local_rank).set(done.device_bytes)


def resident_bytes(pid: int) -> int:
    """The memory that a process has in RAM; 0 when it is gone."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def http_address(host: str) -> str | None:
    """Where to serve a worker that others reach at `host`: there alone if that is this machine's own business, else
    at every address (None), the pod's loopback included, by which `kubectl port-forward` comes."""
    return host if host in ("127.0.0.1", "::1", "localhost") else None


async def serve_http(host: str | None, port: int, metrics: WorkerMetrics, healthy: Callable[[], bool]) -> web.AppRunner:
    """Serve until the runner's cleanup; port 0 takes a free one, which `runner.addresses` tells."""

    async def show_metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def show_health(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if healthy() else web.Response(text="torchrun's thread ended\n", status=500)

    application = web.Application()
    application.add_routes([web.get("/metrics", show_metrics), web.get("/healthz", show_health)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
