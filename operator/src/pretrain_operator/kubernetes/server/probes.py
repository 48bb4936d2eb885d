"""`/metrics` for Prometheus and `/readyz` for the kubelet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from pretrain_operator.metrics.registry import CONTENT_TYPE, OperatorMetrics


def metrics_application(metrics: OperatorMetrics, ready: Callable[[], bool]) -> web.Application:
    """The web application with its two routes. A replica that stands by is ready, too."""

    async def exposition(_: web.Request) -> web.Response:
        text = await asyncio.to_thread(metrics.exposition)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})

    async def readyz(_: web.Request) -> web.Response:
        if ready():
            return web.Response(text="ok")
        return web.Response(status=503, text="pods and nodes are not known yet")

    application = web.Application()
    application.router.add_get("/metrics", exposition)
    application.router.add_get("/readyz", readyz)
    return application
