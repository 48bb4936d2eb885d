"""One operator process: kopf, informers, servers and Lease in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import structlog
from aiohttp import web

from pretrain_operator.coordinator.server import steady_clock
from pretrain_operator.kubernetes.adapter.job_registry import index_of_pod
from pretrain_operator.kubernetes.client.api import NODES, PODS, Api, Object
from pretrain_operator.kubernetes.client.fenced_transport import FencedTransport
from pretrain_operator.kubernetes.client.informer import Informer
from pretrain_operator.kubernetes.client.transport import Transport
from pretrain_operator.kubernetes.leader.active import Active, Stage
from pretrain_operator.kubernetes.leader.lease import Lease
from pretrain_operator.kubernetes.server.health import Heartbeat, Vitals, check
from pretrain_operator.kubernetes.server.options import Options
from pretrain_operator.kubernetes.server.probes import metrics_application
from pretrain_operator.kubernetes.server.watch import watch_jobs
from pretrain_operator.kubernetes.workload.names import WORKER_SELECTOR
from pretrain_operator.metrics.registry import OperatorMetrics

CONCURRENCY = 32
"""Calls of the API server under way at a time."""

log = structlog.get_logger()


class Operator:
    """A replica. It watches and waits; with the Lease it acts, until that is lost, which ends it."""

    def __init__(self, options: Options, transport: Transport) -> None:
        """Raises BadOptions."""
        metrics = OperatorMetrics()
        self._transport = transport
        self._api = api = Api(transport, metrics.api_call, CONCURRENCY)
        pods = Informer(api, PODS, options.namespace, label_selector=WORKER_SELECTOR, index=index_of_pod)
        # Nodes are no namespace's: whoever may read one only reads none of them.
        nodes = Informer(api, NODES, None) if options.namespace is None else None
        self._stage = Stage(options, options.pod_settings(), pods, nodes, metrics, steady_clock())
        identity = f"{options.pod_name or socket.gethostname()}_{uuid.uuid4().hex[:8]}"
        self._lease = Lease(
            api, options.pod_namespace, options.lease_name, identity,
            duration=options.lease_seconds, address=options.address,
        )  # fmt: skip
        self._heartbeat = Heartbeat(time.monotonic)
        self._acting: Active | None = None
        self.active = asyncio.Event()
        """This replica has the Lease, and all jobs are served."""
        pods.subscribe(self._pod_event)
        if nodes is not None:
            nodes.subscribe(self._node_event)

    @property
    def acting(self) -> Active:
        """The active replica at work, once `active`."""
        assert self._acting is not None, "this replica does not act"
        return self._acting

    @property
    def metrics(self) -> OperatorMetrics:
        """What it tells Prometheus."""
        return self._stage.metrics

    async def watch(self, own_signals: Callable[[], None]) -> None:
        """Keep informed until cancelled, as every replica does. Raises what makes it impossible to go on."""
        async with asyncio.TaskGroup() as group:
            for informer in self._informers():
                group.create_task(informer.run())
            group.create_task(self._heartbeat.run())
            group.create_task(watch_jobs(self._stage.options, self._job_event, self._check_health, own_signals))

    async def act(self) -> None:
        """Wait for the Lease, then serve the jobs. Raises LeaseLost; when this returns or raises, nothing acts."""
        for informer in self._informers():
            await informer.synced()
        epoch = await self._lease.acquire()
        log.info("this replica is the active one", epoch=epoch)
        api = Api(FencedTransport(self._transport, self._lease.surely_held), self.metrics.api_call, CONCURRENCY)
        self._acting = acting = Active(self._stage, api, epoch)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._lease.hold())
                await acting.listen()
                group.create_task(acting.run())
                await acting.jobs.listed.wait()
                self.active.set()
        finally:
            self.active.clear()
            self._acting = None
            await acting.close()
            await self._lease.release()
            await acting.hang_up()

    async def serve_metrics(self) -> web.AppRunner:
        """Let Prometheus and the kubelet ask."""
        options = self._stage.options
        runner = web.AppRunner(
            metrics_application(self.metrics, lambda: all(informer.is_synced for informer in self._informers())),
            access_log=None,
            shutdown_timeout=0.5,
        )
        await runner.setup()
        await web.TCPSite(runner, options.listen or None, options.metrics_port).start()
        return runner

    def _informers(self) -> tuple[Informer, ...]:
        stage = self._stage
        return (stage.pods,) if stage.nodes is None else (stage.pods, stage.nodes)

    def _check_health(self) -> None:
        silences = {"pods": self._stage.pods.age}
        if self._stage.nodes is not None:
            silences["nodes"] = self._stage.nodes.age
        oldest_wait = self._acting.jobs.oldest_wait() if self._acting is not None else 0.0
        check(Vitals(lag=self._heartbeat.lag, silences=silences, oldest_wait=oldest_wait))

    def _job_event(self, kind: str, body: Object) -> None:
        if self._acting is not None:
            self._acting.jobs.job_event(kind, body)

    def _pod_event(self, kind: str, pod: Object) -> None:
        if self._acting is not None:
            self._acting.jobs.pod_event(kind, pod)

    def _node_event(self, kind: str, node: Object) -> None:
        if self._acting is not None:
            self._acting.jobs.node_event(kind, node)


class Running:
    """An operator that runs in tasks of this event loop."""

    def __init__(self, operator: Operator, tasks: tuple[asyncio.Task[None], ...]) -> None:
        self.operator = operator
        self._tasks = tasks

    async def ended(self) -> BaseException | None:
        """Wait until it cannot go on; returns why."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        return next((task.exception() for task in done if not task.cancelled()), None)


@contextlib.asynccontextmanager
async def running_operator(
    options: Options,
    own_signals: Callable[[], None] = lambda: None,
    connect: Callable[[Path | None], Awaitable[Transport]] = Transport.connect,
) -> AsyncGenerator[Running]:
    """Run an operator. On leaving, services stop without ending any agent, then the Lease is let go.

    `own_signals` is called whenever the process's signals must be taken (again); `connect` leads to the API server
    that a kubeconfig names. Raises BadOptions."""
    own_signals()
    transport = await connect(options.kubeconfig)
    try:
        operator = Operator(options, transport)
        runner = await operator.serve_metrics()
        watching = asyncio.create_task(operator.watch(own_signals))
        acting = asyncio.create_task(operator.act())
        try:
            yield Running(operator, (watching, acting))
        finally:
            for task in (acting, watching):
                task.cancel()
                await asyncio.wait((task,))
            await runner.cleanup()
    finally:
        await transport.close()
