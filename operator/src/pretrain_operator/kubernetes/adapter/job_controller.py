"""Controller of one job: validates its spec and runs its service from first event to deletion."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import structlog

from pretrain_api.backoff import Backoff, Retries
from pretrain_api.messages.protocol import Shutdown
from pretrain_api.status.job import JobStatus
from pretrain_operator.cluster import Event
from pretrain_operator.coordinator.server import AgentServer
from pretrain_operator.job.ports import JobListener
from pretrain_operator.job.service import JobService
from pretrain_operator.kubernetes.adapter import status_notices as notices
from pretrain_operator.kubernetes.adapter.cluster import KubernetesCluster
from pretrain_operator.kubernetes.client.api import BACKOFF, Api, ApiError, Object
from pretrain_operator.kubernetes.client.informer import Informer
from pretrain_operator.kubernetes.workload.settings import PodSettings
from pretrain_operator.kubernetes.workload.validation import InvalidSpec, parse_job, parse_status
from pretrain_operator.metrics.registry import OperatorMetrics

RESTART_BACKOFF = Backoff(first=1.0, factor=2.0, most=300.0, jitter=1.0)
"""Of a service that failed by a bug."""
HEALED_SECONDS = 600.0
"""Run time of a service after which its failures in a row are forgotten."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Deps:
    """Dependencies that the controllers of all jobs share."""

    api: Api
    pods: Informer
    nodes: Informer | None
    settings: PodSettings
    server: AgentServer
    epoch: int
    metrics: OperatorMetrics
    clock: Callable[[], float]
    """Unix seconds, monotonic."""
    progress_seconds: float
    """Least time between status writes that carry progress only."""
    random: Callable[[], float]
    """Uniform in [0, 1)."""


class JobController:
    """Runs the service of one job, in a task of its own, until the job has ended. After that neither task nor channel
    is left, and late agents are shut down. A bug in serving this job does not affect others."""

    def __init__(self, body: Object, deps: Deps) -> None:
        metadata = body["metadata"]
        self.uid: str = metadata["uid"]
        self.namespace: str = metadata["namespace"]
        self.name: str = metadata["name"]
        self._body = body
        self._deps = deps
        self._stale = False
        """Set if the previous service may have written a later status than this body has."""
        self._cluster: KubernetesCluster | None = None
        self._changed = asyncio.Event()
        self._woken_at: float | None = None
        """Time of the first wake-up without a reconcile since."""
        self._task = asyncio.create_task(self._serve_until_ended(), name=f"job {self.namespace}/{self.name}")

    @property
    def at_rest(self) -> bool:
        """True once the job has ended."""
        return self._task.done()

    @property
    def woken_at(self) -> float | None:
        """Time since which it waits for a reconcile; None: it does not."""
        return self._woken_at

    def changed(self, body: Object) -> None:
        """Take in a version of the job; older versions are ignored."""
        if _version(body) <= _version(self._body):
            return
        self._body = body
        self._changed.set()
        if self._cluster is not None:
            self._cluster.job_changed(body)
        if self.at_rest:
            self._drop_spec()

    def enqueue(self) -> None:
        """Reconcile: pods or nodes changed, or a resync is due."""
        if self._cluster is not None:
            self._cluster.enqueue()

    async def close(self) -> None:
        """Stop serving the job. Its agents keep training."""
        self._task.cancel()
        await asyncio.wait((self._task,))

    def _woken(self) -> None:
        if self._woken_at is None:
            self._woken_at = self._deps.clock()

    async def _serve_until_ended(self) -> None:
        """Serve the job until it has ended, restarting the service after a bug."""
        retries = Retries(RESTART_BACKOFF, self._deps.random)
        while True:
            began = self._deps.clock()
            try:
                await self._until_served()
                return
            except Exception as bug:
                self._stale = True
                log.exception("serving a job failed", namespace=self.namespace, job=self.name)
                if self._deps.clock() - began > HEALED_SECONDS:
                    retries.succeeded()
                pause = retries.delay()
                await self._report(bug, pause)
                await asyncio.sleep(pause)

    async def _until_served(self) -> None:
        await self._until_valid()
        status = await self._serve()
        reason: Literal["succeeded", "failed"] = "succeeded" if status.phase == "Succeeded" else "failed"
        self._deps.server.dismiss(self.uid, Shutdown(epoch=self._deps.epoch, reason=reason, message=status.message))
        self._drop_spec()

    def _drop_spec(self) -> None:
        """Drop the spec: thousands of jobs may have ended."""
        self._body = {"metadata": self._body["metadata"]}

    async def _serve(self) -> JobStatus:
        deps = self._deps
        cluster = KubernetesCluster(deps.api, self._body, deps.pods, deps.nodes, deps.settings, deps.clock)
        highest = parse_status(self._body).generation
        channel = deps.server.open(self.uid, epoch=deps.epoch, highest_number=highest)
        self._cluster = cluster
        cluster.subscribe(self._woken)
        try:
            return await JobService(cluster, channel, self._listener(), deps.clock, deps.progress_seconds).run()
        finally:
            self._cluster = self._woken_at = None
            channel.close()

    def _listener(self) -> JobListener:
        listener = self._deps.metrics.job(self.namespace, self.name)

        def reconciled(status: JobStatus, seconds: float) -> None:
            self._woken_at = None
            listener.reconciled(status, seconds)

        return replace(listener, reconciled=reconciled)

    async def _until_valid(self) -> None:
        """Wait until the spec is valid, reporting its errors in the status."""
        retries = Retries(BACKOFF, self._deps.random)
        while True:
            self._changed.clear()
            try:
                if self._stale:
                    self._body, self._stale = await notices.fetch_current(self._deps.api, self._body), False
                errors = self._spec_errors()
                await self._update_status(partial(self._with_verdict, errors))
                if not errors:
                    return
                retries.succeeded()
                await self._changed.wait()
            except ApiError as error:
                if error.status == 404:  # its DELETED event is on the way
                    await self._changed.wait()
                await asyncio.sleep(retries.delay())

    def _spec_errors(self) -> str:
        try:
            parse_job(self._body, self._deps.settings)
        except InvalidSpec as error:
            return str(error)
        return ""

    def _with_verdict(self, errors: str, status: JobStatus, body: Object) -> JobStatus:
        now = self._deps.clock()
        return notices.invalid_spec(status, body, errors, now) if errors else notices.cleared(status, body, now)

    async def _update_status(self, change: Callable[[JobStatus, Object], JobStatus]) -> None:
        """Write a changed status."""
        if change(before := parse_status(self._body), self._body) != before:
            self._body = await notices.write_notice(self._deps.api, self._body, change)

    async def _report(self, bug: Exception, pause: float) -> None:
        message = f"internal error while serving this job, retrying: {type(bug).__name__}: {bug}"
        now = self._deps.clock()
        try:
            await self._update_status(lambda status, body: notices.internal_error(status, body, message, now))
            deps = self._deps
            cluster = KubernetesCluster(deps.api, self._body, deps.pods, deps.nodes, deps.settings, deps.clock)
            await cluster.emit(Event("Warning", "InternalError", message))
        except Exception as error:  # perhaps the same bug; the log has it
            log.warning("cannot write the status of a job", job=self.name, pause=pause, error=str(error))


def _version(body: Object) -> int:
    """Which of two is the newer one. Resource versions are decimal numbers that rise with every write."""
    return int(body["metadata"]["resourceVersion"])
