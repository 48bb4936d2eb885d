"""HTTP endpoints: `/metrics` for Prometheus, `/readyz` and `/healthz` for the kubelet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from pretrain_operator.kubernetes.server.health import Unhealthy
from pretrain_operator.metrics.registry import CONTENT_TYPE, OperatorMetrics


def metrics_application(metrics: OperatorMetrics, ready: Callable[[], bool]) -> web.Application:
    """Return the application with `/metrics` and `/readyz`. A standby replica is ready, too."""

    async def exposition(_: web.Request) -> web.Response:
        text = await asyncio.to_thread(metrics.exposition)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})

    async def readyz(_: web.Request) -> web.Response:
        if ready():
            return web.Response(text="ok")
        return web.Response(status=503, text="the caches of pods and nodes are not synced")

    application = web.Application()
    application.router.add_get("/metrics", exposition)
    application.router.add_get("/readyz", readyz)
    return application


def health_application(check: Callable[[], None]) -> web.Application:
    """Return the application with `/healthz`: 500 with the reason if `check` raises Unhealthy."""

    async def healthz(_: web.Request) -> web.Response:
        try:
            check()
        except Unhealthy as error:
            return web.Response(status=500, text=str(error))
        return web.Response(text="ok")

    application = web.Application()
    application.router.add_get("/healthz", healthz)
    return application
