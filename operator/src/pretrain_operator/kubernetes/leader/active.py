"""Duties of the leader: serve the jobs, listen for agents, be the endpoint of the Service."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
from aiohttp import web

from pretrain_api.backoff import Retries
from pretrain_operator.coordinator.server import AgentServer
from pretrain_operator.kubernetes.adapter.janitor import Janitor
from pretrain_operator.kubernetes.adapter.job_controller import Deps
from pretrain_operator.kubernetes.adapter.job_registry import JobRegistry
from pretrain_operator.kubernetes.client.api import BACKOFF, JOBS, PODS, Api, ApiError
from pretrain_operator.kubernetes.client.informer import Informer, metadata_only
from pretrain_operator.kubernetes.server.options import BadOptions, Options
from pretrain_operator.kubernetes.server.tokens import TokenReview
from pretrain_operator.kubernetes.workload.settings import PodSettings
from pretrain_operator.metrics.registry import OperatorMetrics

ACTIVE_LABEL = "pretrain.dev/active"
DEPLOYMENT_LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/instance")
"""Labels that the replicas of one operator share."""
CERTIFICATE_SECONDS = 60.0
"""Period of checks for a renewed certificate."""
GOODBYE_SECONDS = 0.5
"""Longest wait for agents when the server closes."""

log = structlog.get_logger()


@dataclass(frozen=True)
class SharedState:
    """State that a replica keeps whether it leads or not."""

    options: Options
    settings: PodSettings
    pods: Informer
    nodes: Informer | None
    metrics: OperatorMetrics
    clock: Callable[[], float]
    """Unix seconds, monotonic."""


class ActiveReplica:
    """The leader at work: `run` until cancelled, `close` to stop acting, `hang_up` to stop listening."""

    def __init__(self, shared: SharedState, api: Api, epoch: int) -> None:
        """Set up the servers. `api` must refuse writes once the Lease may be lost. Raises BadOptions."""
        options = shared.options
        review = TokenReview(
            api, shared.pods, options.audience, lambda uid: self.jobs.namespace_of(uid), shared.metrics.agent_refused
        )
        server = AgentServer(review, shared.clock, refused=shared.metrics.message_refused)
        deps = Deps(
            api, shared.pods, shared.nodes, shared.settings, server, epoch, shared.metrics, shared.clock,
            options.progress_seconds, random.random,
        )  # fmt: skip
        self.jobs = JobRegistry(deps)
        self._job_informer = Informer(api, JOBS, options.namespace, keep=metadata_only)
        self._job_informer.subscribe(self.jobs.job_event)
        self._shared = shared
        self._api = api
        self._certificate = None if options.tls_dir is None else Certificate(options.tls_dir)
        self._runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=GOODBYE_SECONDS)
        shared.metrics.watch_agents(lambda: server.connections)
        shared.metrics.watch_queue(self.jobs.waiting, self.jobs.oldest_wait)
        shared.metrics.leading(True)

    @property
    def job_watch_age(self) -> float:
        """Seconds since the watch of the jobs heard from the API server."""
        return self._job_informer.age

    async def synced(self) -> None:
        """Return when every job has a controller."""
        await self._job_informer.synced()

    @property
    def agents_port(self) -> int:
        """TCP port for agents, once listening."""
        port: int = self._runner.addresses[0][1]
        return port

    async def listen(self) -> None:
        """Accept connections of agents."""
        options = self._shared.options
        await self._runner.setup()
        context = self._certificate.context if self._certificate is not None else None
        site = web.TCPSite(self._runner, options.listen or None, options.agents_port, ssl_context=context)
        await site.start()

    async def run(self) -> None:
        """Serve all jobs until cancelled."""
        options = self._shared.options
        async with asyncio.TaskGroup() as group:
            group.create_task(self._job_informer.run())
            group.create_task(self._resync())
            group.create_task(self._clean_up())
            if options.pod_name:
                group.create_task(claim(self._api, options.pod_namespace, options.pod_name))
            if self._certificate is not None:
                group.create_task(self._certificate.renew())

    async def close(self) -> None:
        """Stop acting at once. Agents keep training without an operator."""
        self._shared.metrics.leading(False)
        await self.jobs.close()

    async def hang_up(self) -> None:
        """Stop listening and close all connections."""
        await self._runner.cleanup()

    async def _resync(self) -> None:
        await self.synced()
        await self.jobs.resync()

    async def _clean_up(self) -> None:
        await self.synced()
        await Janitor(self._api, self._shared.pods, self.jobs.is_at_rest, self._shared.clock).run()


async def claim(api: Api, namespace: str, pod_name: str) -> None:
    """Make this replica the only endpoint of the Service, retrying until that succeeds."""
    retries = Retries(BACKOFF, random.random)
    while True:
        try:
            return await _claim(api, namespace, pod_name)
        except ApiError as error:
            log.warning("cannot label the active replica", reason=error.reason, error=str(error))
            await asyncio.sleep(retries.delay(at_least=error.retry_after))


async def _claim(api: Api, namespace: str, pod_name: str) -> None:
    own = await api.merge_patch(PODS, namespace, pod_name, {"metadata": {"labels": {ACTIVE_LABEL: "true"}}})
    labels: dict[str, str] = own["metadata"]["labels"]
    shared = [f"{label}={labels[label]}" for label in DEPLOYMENT_LABELS if label in labels]
    if len(shared) < len(DEPLOYMENT_LABELS):
        log.warning("this pod lacks the labels that identify its replicas", needed=DEPLOYMENT_LABELS)
        return
    replicas, _ = await api.list(PODS, namespace, label_selector=",".join([*shared, f"{ACTIVE_LABEL}=true"]))
    for pod in replicas:
        if pod["metadata"]["name"] != pod_name:
            unlabelled = {"metadata": {"uid": pod["metadata"]["uid"], "labels": {ACTIVE_LABEL: None}}}
            try:
                await api.merge_patch(PODS, namespace, pod["metadata"]["name"], unlabelled)
            except ApiError as error:
                if error.status not in (404, 409):  # deleted, or replaced by another pod of the same name
                    raise


class Certificate:
    """TLS certificate of the server, reloaded when the mounted files change."""

    def __init__(self, folder: Path) -> None:
        """Load the certificate. Raises BadOptions."""
        self._folder = folder
        self._read_at: tuple[float, float] | None = None
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            self._load()
        except (OSError, ssl.SSLError) as error:
            raise BadOptions(f"--tls-dir: no certificate can be loaded from {folder}: {error}") from error

    async def renew(self) -> None:
        """Reload the certificate for new connections whenever it changes, until cancelled."""
        while True:
            await asyncio.sleep(CERTIFICATE_SECONDS)
            try:
                self._load()
            except (OSError, ssl.SSLError) as error:
                log.warning("cannot load the renewed certificate; keeping the current one", error=str(error))

    def _load(self) -> None:
        certificate, key = self._folder / "tls.crt", self._folder / "tls.key"
        written = certificate.stat().st_mtime, key.stat().st_mtime
        if written != self._read_at:
            self.context.load_cert_chain(certificate, key)
            self._read_at = written
