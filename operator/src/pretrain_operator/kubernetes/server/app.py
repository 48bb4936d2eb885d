"""One operator process: informers, HTTP servers and leader election in one event loop."""

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
from pretrain_operator.kubernetes.client.informer import Informer
from pretrain_operator.kubernetes.client.transport import FencedTransport, Transport
from pretrain_operator.kubernetes.leader.active import ActiveReplica, SharedState
from pretrain_operator.kubernetes.leader.lease import Lease
from pretrain_operator.kubernetes.server.health import LoopLag, Vitals, check
from pretrain_operator.kubernetes.server.options import Options
from pretrain_operator.kubernetes.server.probes import health_application, metrics_application
from pretrain_operator.kubernetes.workload.names import WORKER_SELECTOR
from pretrain_operator.metrics.registry import OperatorMetrics

CONCURRENCY = 32
"""Maximum number of API calls in flight."""

log = structlog.get_logger()


class Operator:
    """One replica. It watches pods and nodes, and serves the jobs while it holds the Lease; losing it ends the
    process."""

    def __init__(self, options: Options, transport: Transport) -> None:
        """Set up caches and leader election. Raises BadOptions."""
        metrics = OperatorMetrics()
        self._transport = transport
        self._api = api = Api(transport, metrics.api_call, CONCURRENCY)
        pods = Informer(api, PODS, options.namespace, label_selector=WORKER_SELECTOR, index=index_of_pod)
        # Nodes are cluster-scoped: an operator restricted to one namespace has no right to read them.
        nodes = Informer(api, NODES, None) if options.namespace is None else None
        self._shared = SharedState(options, options.pod_settings(), pods, nodes, metrics, steady_clock())
        identity = f"{options.pod_name or socket.gethostname()}_{uuid.uuid4().hex[:8]}"
        self._lease = Lease(
            api, options.pod_namespace, options.lease_name, identity,
            duration=options.lease_seconds, address=options.address,
        )  # fmt: skip
        self._loop_lag = LoopLag(time.monotonic)
        self._acting: ActiveReplica | None = None
        self.active = asyncio.Event()
        """Set while this replica holds the Lease and serves all jobs."""
        pods.subscribe(self._pod_event)
        if nodes is not None:
            nodes.subscribe(self._node_event)

    @property
    def acting(self) -> ActiveReplica:
        """The duties of the leader; only while `active` is set."""
        assert self._acting is not None, "this replica is on standby"
        return self._acting

    @property
    def metrics(self) -> OperatorMetrics:
        """Metrics of this replica."""
        return self._shared.metrics

    async def watch(self) -> None:
        """Keep the caches current until cancelled, as every replica does."""
        async with asyncio.TaskGroup() as group:
            for informer in self._informers():
                group.create_task(informer.run())
            group.create_task(self._loop_lag.run())

    async def act(self) -> None:
        """Acquire the Lease, then serve the jobs. Raises LeaseLost; all work has stopped when this returns or
        raises."""
        for informer in self._informers():
            await informer.synced()
        epoch = await self._lease.acquire()
        log.info("acquired the lease", epoch=epoch)
        api = Api(FencedTransport(self._transport, self._lease.surely_held), self.metrics.api_call, CONCURRENCY)
        self._acting = acting = ActiveReplica(self._shared, api, epoch)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._lease.hold())
                await acting.listen()
                group.create_task(acting.run())
                await acting.synced()
                self.active.set()
        finally:
            self.active.clear()
            self._acting = None
            await acting.close()
            await self._lease.release()
            await acting.hang_up()

    @contextlib.asynccontextmanager
    async def serving_probes(self) -> AsyncGenerator[None]:
        """Serve `/metrics`, `/readyz` and `/healthz`."""
        options = self._shared.options
        applications = (
            (metrics_application(self.metrics, self._is_ready), options.metrics_port),
            (health_application(self._check_health), options.probe_port),
        )
        async with contextlib.AsyncExitStack() as stack:
            for application, port in applications:
                runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.5)
                await runner.setup()
                stack.push_async_callback(runner.cleanup)
                await web.TCPSite(runner, options.listen or None, port).start()
            yield

    def _informers(self) -> tuple[Informer, ...]:
        shared = self._shared
        return (shared.pods,) if shared.nodes is None else (shared.pods, shared.nodes)

    def _is_ready(self) -> bool:
        return all(informer.is_synced for informer in self._informers())

    def _check_health(self) -> None:
        silences = {"pods": self._shared.pods.age}
        if self._shared.nodes is not None:
            silences["nodes"] = self._shared.nodes.age
        oldest_wait = 0.0
        if self._acting is not None:
            silences["jobs"] = self._acting.job_watch_age
            oldest_wait = self._acting.jobs.oldest_wait()
        check(Vitals(lag=self._loop_lag.seconds, silences=silences, oldest_wait=oldest_wait))

    def _pod_event(self, kind: str, pod: Object) -> None:
        if self._acting is not None:
            self._acting.jobs.pod_event(kind, pod)

    def _node_event(self, kind: str, node: Object) -> None:
        if self._acting is not None:
            self._acting.jobs.node_event(kind, node)


class RunningOperator:
    """An operator that runs in tasks of this event loop."""

    def __init__(self, operator: Operator, tasks: tuple[asyncio.Task[None], ...]) -> None:
        self.operator = operator
        self._tasks = tasks

    async def ended(self) -> BaseException | None:
        """Wait until it ends by itself; returns the error."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        return next((task.exception() for task in done if not task.cancelled()), None)


@contextlib.asynccontextmanager
async def running_operator(
    options: Options, connect: Callable[[Path | None], Awaitable[Transport]] = Transport.connect
) -> AsyncGenerator[RunningOperator]:
    """Run an operator. On exit, controllers stop without ending any agent, then the Lease is released.

    `connect` opens the transport to the API server that a kubeconfig names. Raises BadOptions."""
    transport = await connect(options.kubeconfig)
    try:
        operator = Operator(options, transport)
        async with operator.serving_probes():
            tasks = asyncio.create_task(operator.watch()), asyncio.create_task(operator.act())
            try:
                yield RunningOperator(operator, tasks)
            finally:
                for task in reversed(tasks):
                    task.cancel()
                    await asyncio.wait((task,))
    finally:
        await transport.close()
