"""One job in the care of this operator: from the first word of it to the last."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import structlog

from pretrain_api.messages.protocol import Shutdown
from pretrain_api.status.job import JobStatus
from pretrain_operator.cluster import Event
from pretrain_operator.coordinator.server import AgentServer
from pretrain_operator.job.ports import JobListener
from pretrain_operator.job.service import JobService
from pretrain_operator.job.wakeup import Retries
from pretrain_operator.kubernetes.adapter import status_notices as notices
from pretrain_operator.kubernetes.adapter.cluster import KubernetesCluster
from pretrain_operator.kubernetes.client.api import Api, ApiError, Object
from pretrain_operator.kubernetes.client.informer import Informer
from pretrain_operator.kubernetes.workload.settings import PodSettings
from pretrain_operator.kubernetes.workload.validation import InvalidSpec, parse_job, parse_status
from pretrain_operator.metrics.registry import OperatorMetrics

FIRST_RESTART_SECONDS = 1.0
LAST_RESTART_SECONDS = 300.0
HEALED_SECONDS = 600.0
"""A service that ran for so long before it failed is started again as if it had never failed."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Desk:
    """What the services of all jobs work with."""

    api: Api
    pods: Informer
    nodes: Informer | None
    settings: PodSettings
    server: AgentServer
    epoch: int
    metrics: OperatorMetrics
    clock: Callable[[], float]
    """Unix seconds that never jump."""
    progress_seconds: float
    """Between two writes of a status for nothing but progress."""


class ServedJob:
    """Runs the service of one job, in a task of its own, until the job's work is over: then neither task nor channel
    is left, and agents that come late are told to go. A bug in serving this job is kept from all others."""

    def __init__(self, body: Object, desk: Desk) -> None:
        metadata = body["metadata"]
        self.uid: str = metadata["uid"]
        self.namespace: str = metadata["namespace"]
        self.name: str = metadata["name"]
        self._body = body
        self._desk = desk
        self._stale = False
        """The service before this one may have written a later status than is known here."""
        self._cluster: KubernetesCluster | None = None
        self._changed = asyncio.Event()
        self._woken_at: float | None = None
        """When the wake-up came that no look has followed yet."""
        self._task = asyncio.create_task(self._care(), name=f"job {self.namespace}/{self.name}")

    @property
    def at_rest(self) -> bool:
        """Its work is over."""
        return self._task.done()

    @property
    def woken_at(self) -> float | None:
        """Since when it waits to be looked at; None: it does not."""
        return self._woken_at

    def changed(self, body: Object) -> None:
        """The API server has the job like this. What is older than what is known is passed over."""
        if _version(body) <= _version(self._body):
            return
        self._body = body
        self._changed.set()
        if self._cluster is not None:
            self._cluster.job_changed(body)
        if self.at_rest:
            self._remember_little()

    def poke(self) -> None:
        """Its pods or their nodes changed, or it is time to look again."""
        if self._cluster is not None:
            self._cluster.poke()

    async def close(self) -> None:
        """Stop serving it; its agents go on."""
        self._task.cancel()
        await asyncio.wait((self._task,))

    def _woken(self) -> None:
        if self._woken_at is None:
            self._woken_at = self._desk.clock()

    async def _care(self) -> None:
        """Serve the job until its work is over, whatever goes wrong on the way."""
        failures = 0
        while True:
            began = self._desk.clock()
            try:
                await self._until_served()
                return
            except Exception as bug:
                self._stale = True
                log.exception("serving a job failed", namespace=self.namespace, job=self.name)
                failures = 1 if self._desk.clock() - began > HEALED_SECONDS else failures + 1
                pause = min(LAST_RESTART_SECONDS, FIRST_RESTART_SECONDS * 2.0 ** min(failures - 1, 16))
                await self._tell_of(bug, pause)
                await asyncio.sleep(pause)

    async def _until_served(self) -> None:
        await self._until_valid()
        status = await self._serve()
        reason: Literal["succeeded", "failed"] = "succeeded" if status.phase == "Succeeded" else "failed"
        self._desk.server.dismiss(self.uid, Shutdown(epoch=self._desk.epoch, reason=reason, message=status.message))
        self._remember_little()

    def _remember_little(self) -> None:
        """Thousands of jobs may be at rest."""
        self._body = {"metadata": self._body["metadata"]}

    async def _serve(self) -> JobStatus:
        desk = self._desk
        cluster = KubernetesCluster(desk.api, self._body, desk.pods, desk.nodes, desk.settings, desk.clock)
        highest = parse_status(self._body).generation
        channel = desk.server.open(self.uid, epoch=desk.epoch, highest_number=highest)
        self._cluster = cluster
        cluster.subscribe(self._woken)
        try:
            return await JobService(cluster, channel, self._listener(), desk.clock, desk.progress_seconds).run()
        finally:
            self._cluster = self._woken_at = None
            channel.close()

    def _listener(self) -> JobListener:
        listener = self._desk.metrics.job(self.namespace, self.name)

        def looked(status: JobStatus, seconds: float) -> None:
            self._woken_at = None
            listener.looked(status, seconds)

        return replace(listener, looked=looked)

    async def _until_valid(self) -> None:
        """Wait until the spec can be acted on, saying in the status why it cannot."""
        retries = Retries()
        while True:
            self._changed.clear()
            try:
                if self._stale:
                    self._body, self._stale = await notices.newest(self._desk.api, self._body), False
                wrong = self._what_is_wrong()
                await self._note(partial(self._judged, wrong))
                if not wrong:
                    return
                retries.succeeded()
                await self._changed.wait()
            except ApiError as error:
                if error.status == 404:  # the news of its deletion is on its way
                    await self._changed.wait()
                await asyncio.sleep(retries.delay())

    def _what_is_wrong(self) -> str:
        try:
            parse_job(self._body, self._desk.settings)
        except InvalidSpec as error:
            return str(error)
        return ""

    def _judged(self, wrong: str, status: JobStatus, body: Object) -> JobStatus:
        now = self._desk.clock()
        return notices.invalid(status, body, wrong, now) if wrong else notices.lifted(status, body, now)

    async def _note(self, change: Callable[[JobStatus, Object], JobStatus]) -> None:
        """Change the status, if that changes it."""
        if change(before := parse_status(self._body), self._body) != before:
            self._body = await notices.write_notice(self._desk.api, self._body, change)

    async def _tell_of(self, bug: Exception, pause: float) -> None:
        message = f"the operator met a bug in serving this job and tries again: {type(bug).__name__}: {bug}"
        now = self._desk.clock()
        try:
            await self._note(lambda status, body: notices.broken(status, body, message, now))
            desk = self._desk
            cluster = KubernetesCluster(desk.api, self._body, desk.pods, desk.nodes, desk.settings, desk.clock)
            await cluster.emit(Event("Warning", "InternalError", message))
        except Exception as error:  # it may be the same bug; the log has it
            log.warning("a job's status cannot be written", job=self.name, pause=pause, error=str(error))


def _version(body: Object) -> int:
    """Which of two is the newer one. Resource versions are decimal numbers that rise with every write."""
    return int(body["metadata"]["resourceVersion"])
