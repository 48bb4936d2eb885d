"""What this worker tells Prometheus and the kubelet: /metrics and /healthz."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

STEP_BUCKETS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 30, 60, 120)


class WorkerMetrics:
    """The metrics of one worker."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.step = Gauge("pretrain_worker_step", "Steps completed", registry=self.registry)
        self.step_seconds = Histogram(
            "pretrain_worker_step_seconds",
            "Duration of a step, by global rank 0",
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )
        self.generation = Gauge(
            "pretrain_worker_generation", "Generation whose ranks run here, 0: none", registry=self.registry
        )
        self.dropped = Counter(
            "pretrain_worker_reports_dropped", "Reports of steps lost for want of a reader", registry=self.registry
        )
        self.restarts = Counter(
            "pretrain_worker_restarts",
            "Starts of ranks, by the generation's reason",
            ["reason"],
            registry=self.registry,
        )
        self.connected = Gauge(
            "pretrain_worker_connected", "1 while the coordinator knows this agent", registry=self.registry
        )


async def serve_http(host: str, port: int, metrics: WorkerMetrics, healthy: Callable[[], bool]) -> web.AppRunner:
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
