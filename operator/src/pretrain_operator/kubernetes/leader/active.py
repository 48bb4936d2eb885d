"""What only the active replica does: it serves the jobs, listens for agents, and is the one that the Service finds."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
from aiohttp import web

from pretrain_operator.coordinator.server import AgentServer
from pretrain_operator.kubernetes.adapter.janitor import Janitor
from pretrain_operator.kubernetes.adapter.job_controller import Desk
from pretrain_operator.kubernetes.adapter.job_registry import Jobs
from pretrain_operator.kubernetes.client.api import PODS, Api, ApiError
from pretrain_operator.kubernetes.client.backoff import Backoff
from pretrain_operator.kubernetes.client.informer import Informer
from pretrain_operator.kubernetes.server.options import BadOptions, Options
from pretrain_operator.kubernetes.server.tokens import TokenReview
from pretrain_operator.kubernetes.workload.settings import PodSettings
from pretrain_operator.metrics.registry import OperatorMetrics

ACTIVE_LABEL = "pretrain.dev/active"
DEPLOYMENT_LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/instance")
"""Replicas of this operator are the pods that have these labels in common with its own."""
CERTIFICATE_SECONDS = 60.0
"""Between two looks whether the certificate was renewed."""
GOODBYE_SECONDS = 0.5
"""Agents are waited for no longer than this when the server closes."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Stage:
    """What every replica has ready."""

    options: Options
    settings: PodSettings
    pods: Informer
    nodes: Informer | None
    metrics: OperatorMetrics
    clock: Callable[[], float]
    """Unix seconds that never jump."""


class Active:
    """The active replica at work. `run` goes on until cancelled; `close` stops acting, `hang_up` listening."""

    def __init__(self, stage: Stage, api: Api, epoch: int) -> None:
        """`api` must refuse to write once this replica is no longer the active one."""
        options = stage.options
        review = TokenReview(
            api, stage.pods, options.audience, lambda uid: self.jobs.namespace_of(uid), stage.metrics.agent_refused
        )
        server = AgentServer(review, stage.clock)
        desk = Desk(
            api, stage.pods, stage.nodes, stage.settings, server, epoch, stage.metrics, stage.clock,
            options.progress_seconds,
        )  # fmt: skip
        self.jobs = Jobs(desk, options.namespace, random.random)
        self._stage = stage
        self._api = api
        self._certificate = None if options.tls_dir is None else Certificate(options.tls_dir)
        self._runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=GOODBYE_SECONDS)
        stage.metrics.watch_agents(lambda: server.connections)
        stage.metrics.watch_queue(self.jobs.waiting, self.jobs.oldest_wait)
        stage.metrics.leading(True)

    @property
    def agents_port(self) -> int:
        """Where agents connect, once listening."""
        port: int = self._runner.addresses[0][1]
        return port

    async def listen(self) -> None:
        """Let agents connect."""
        options = self._stage.options
        await self._runner.setup()
        context = self._certificate.context if self._certificate is not None else None
        site = web.TCPSite(self._runner, options.listen or None, options.agents_port, ssl_context=context)
        await site.start()

    async def run(self) -> None:
        """Serve all jobs until cancelled."""
        stage = self._stage
        async with asyncio.TaskGroup() as group:
            group.create_task(self.jobs.run())
            group.create_task(self._clean_up())
            if stage.options.pod_name:
                group.create_task(claim(self._api, stage.options.pod_namespace, stage.options.pod_name))
            if self._certificate is not None:
                group.create_task(self._certificate.renew())

    async def close(self) -> None:
        """Stop acting at once. Agents go on without an operator."""
        self._stage.metrics.leading(False)
        await self.jobs.close()

    async def hang_up(self) -> None:
        """Stop listening, close all connections."""
        await self._runner.cleanup()

    async def _clean_up(self) -> None:
        await self.jobs.listed.wait()
        await Janitor(self._api, self._stage.pods, self.jobs.is_at_rest, self._stage.clock).run()


async def claim(api: Api, namespace: str, pod_name: str) -> None:
    """Have the Service lead to this replica, and to no other one. Tries until it succeeds."""
    backoff = Backoff(random.random)
    while True:
        try:
            return await _claim(api, namespace, pod_name)
        except ApiError as error:
            log.warning("the active replica's label cannot be set", reason=error.reason, error=str(error))
            await asyncio.sleep(backoff.delay(at_least=error.retry_after))


async def _claim(api: Api, namespace: str, pod_name: str) -> None:
    own = await api.merge_patch(PODS, namespace, pod_name, {"metadata": {"labels": {ACTIVE_LABEL: "true"}}})
    labels: dict[str, str] = own["metadata"]["labels"]
    shared = [f"{label}={labels[label]}" for label in DEPLOYMENT_LABELS if label in labels]
    if len(shared) < len(DEPLOYMENT_LABELS):
        log.warning("this pod lacks the labels by which its replicas are known", needed=DEPLOYMENT_LABELS)
        return
    replicas, _ = await api.list(PODS, namespace, label_selector=",".join([*shared, f"{ACTIVE_LABEL}=true"]))
    for pod in replicas:
        if pod["metadata"]["name"] != pod_name:
            unlabelled = {"metadata": {"uid": pod["metadata"]["uid"], "labels": {ACTIVE_LABEL: None}}}
            try:
                await api.merge_patch(PODS, namespace, pod["metadata"]["name"], unlabelled)
            except ApiError as error:
                if error.status not in (404, 409):  # it is gone, or another one by its name
                    raise


class Certificate:
    """The server's certificate, which is renewed from time to time in the folder that it is mounted to."""

    def __init__(self, folder: Path) -> None:
        """Raises BadOptions."""
        self._folder = folder
        self._read_at: tuple[float, float] | None = None
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            self._load()
        except (OSError, ssl.SSLError) as error:
            raise BadOptions(f"--tls-dir: no certificate can be loaded from {folder}: {error}") from error

    async def renew(self) -> None:
        """Use for new connections what is in the folder, for ever."""
        while True:
            await asyncio.sleep(CERTIFICATE_SECONDS)
            try:
                self._load()
            except (OSError, ssl.SSLError) as error:
                log.warning("the renewed certificate cannot be loaded: the old one stays", error=str(error))

    def _load(self) -> None:
        certificate, key = self._folder / "tls.crt", self._folder / "tls.key"
        written = certificate.stat().st_mtime, key.stat().st_mtime
        if written != self._read_at:
            self.context.load_cert_chain(certificate, key)
            self._read_at = written
