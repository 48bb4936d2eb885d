"""The `Cluster` port on Kubernetes, for one job."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

import structlog

from pretrain_api.status.job import JobStatus
from pretrain_operator.cluster import Event, Placement, Pod, Snapshot
from pretrain_operator.kubernetes.adapter.events import event_object, repeated
from pretrain_operator.kubernetes.adapter.expectations import OVERDUE_SECONDS, Expectations
from pretrain_operator.kubernetes.adapter.job_record import JobRecord
from pretrain_operator.kubernetes.client.api import (
    CONFIG_MAPS,
    EVENTS,
    NETWORK_POLICIES,
    PODS,
    Api,
    ApiError,
    Object,
    Resource,
)
from pretrain_operator.kubernetes.client.informer import Informer
from pretrain_operator.kubernetes.client.refusals import refusal
from pretrain_operator.kubernetes.workload import manifests
from pretrain_operator.kubernetes.workload.names import WorkerPod, owner_uid, pod_name, worker_pod
from pretrain_operator.kubernetes.workload.pods import pod_of
from pretrain_operator.kubernetes.workload.settings import PodSettings

LOOKUP_SECONDS = 2.0
"""Time limit of a lookup within a reconcile; after it the last known state counts."""

log = structlog.get_logger()


class KubernetesCluster:
    """Pods, status and Events of one job. Reads come from informers, corrected by this process's own writes, and cost
    no API call.

    `pods` must be indexed by `names.index_by_job`; `nodes` is None where nodes may not be read."""

    def __init__(
        self,
        api: Api,
        body: Object,
        pods: Informer,
        nodes: Informer | None,
        settings: PodSettings,
        clock: Callable[[], float],
    ) -> None:
        """Parse the job. Raises InvalidSpec if its user must fix the spec first."""
        self._api = api
        self._pods = pods
        self._nodes = nodes
        self._settings = settings
        self._clock = clock
        self._record = JobRecord(api, body, settings)
        self._namespace: str = body["metadata"]["namespace"]
        self._expectations = Expectations(clock)
        self._prepared = False
        self._subscribers: list[Callable[[], None]] = []

    def job_changed(self, body: Object) -> None:
        """Take in a new version of the job; wake the service if it matters."""
        if self._record.learn(body):
            self.enqueue()

    def enqueue(self) -> None:
        """Wake the service: pods or nodes may have changed, or a resync is due."""
        for changed in self._subscribers:
            changed()

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Call `changed` whenever the next snapshot may differ."""
        self._subscribers.append(changed)

    async def snapshot(self) -> Snapshot:
        """Return the job, its last written status and its pods."""
        record = self._record
        pods = self._expectations.corrected(self._pods.indexed(record.uid))
        if overdue := self._expectations.overdue():
            await asyncio.gather(*map(self._look_up, overdue))
            pods = self._expectations.corrected(self._pods.indexed(record.uid))
        return Snapshot(
            job=record.job,
            status=record.status,
            pods=tuple(sorted(map(self._seen, pods), key=lambda pod: (pod.slot, pod.attempt))),
            stopping=record.stopping,
            profile=record.profile,
            invalid=record.invalid,
        )

    async def create_pod(self, slot: int, attempt: int, placement: Placement) -> None:
        """Create a worker's pod under its deterministic name; succeeds if it exists. Raises Refused."""
        await self._prepare()
        job = self._record.job
        body = manifests.pod(job, slot, attempt, placement, self._settings)
        try:
            pod = await self._api.create(PODS, self._namespace, body)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise refusal(error, f"worker {slot}") from error
            pod = await self._adopted(pod_name(job, slot, attempt), WorkerPod(self._record.uid, slot, attempt))
        self._expect(pod)

    async def delete_pod(self, pod: Pod, grace_seconds: float) -> None:
        """Delete a worker's pod: SIGTERM, SIGKILL after the grace period (0: at once). Succeeds if it is gone."""
        name = pod_name(self._record.job, pod.slot, pod.attempt)
        found = self._pods.get(self._namespace, name) or self._expectations.get(name)
        if found is None or worker_pod(found) != (self._record.uid, pod.slot, pod.attempt):
            return
        uid: str = found["metadata"]["uid"]
        await self._api.delete(PODS, self._namespace, name, uid=uid, grace_seconds=math.ceil(grace_seconds))
        self._expectations.deleted(found)

    async def delete_job(self) -> None:
        """Delete the job and, by garbage collection, its children. Succeeds if it is gone."""
        await self._record.delete()

    async def write_status(self, status: JobStatus) -> None:
        """Replace the job's status. Raises Gone if the job was deleted."""
        if await self._record.write_status(status):
            self.enqueue()

    async def emit(self, event: Event) -> None:
        """Write an Event, best effort: never raises."""
        now = self._clock()
        body = event_object(self._record.job, event, now)
        name: str = body["metadata"]["name"]
        try:
            try:
                await self._api.create(EVENTS, self._namespace, body)
            except ApiError as error:
                if error.reason != "AlreadyExists":
                    raise
                before = await self._api.get(EVENTS, self._namespace, name)
                await self._api.merge_patch(EVENTS, self._namespace, name, repeated(before, now))
        except ApiError as error:
            log.warning("event lost", job=self._record.job.metadata.name, reason=event.reason, error=str(error))

    async def _prepare(self) -> None:
        """Create what pods need, once; it is immutable."""
        if self._prepared:
            return
        job = self._record.job
        await self._ensure(CONFIG_MAPS, manifests.config_map(job, self._settings), "the workers' configuration")
        await self._ensure(NETWORK_POLICIES, manifests.network_policy(job), "the workers' network policy")
        self._prepared = True

    async def _ensure(self, resource: Resource, body: Object, what: str) -> None:
        name: str = body["metadata"]["name"]
        try:
            await self._api.create(resource, self._namespace, body)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise refusal(error, what) from error
            found = await self._api.get(resource, self._namespace, name)
            if owner_uid(found) != self._record.uid:
                raise OSError(_foreign(resource, name)) from error

    async def _adopted(self, name: str, worker: WorkerPod) -> Object:
        """Return the existing pod of this name, created by an operator that did not receive the answer."""
        found = await self._api.get(PODS, self._namespace, name)
        if worker_pod(found) != worker:
            raise OSError(_foreign(PODS, name))
        if "deletionTimestamp" in found["metadata"]:
            raise OSError(f"pod {name} is still being deleted")
        return found

    def _expect(self, pod: Object) -> None:
        """Expect the pod in the informer; reconcile if it does not appear in time."""
        self._expectations.created(pod)
        asyncio.get_running_loop().call_later(OVERDUE_SECONDS, self.enqueue)

    async def _look_up(self, pod: Object) -> None:
        """Look up a pod that the informer does not show; without an answer it stays expected."""
        name: str = pod["metadata"]["name"]
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                self._expect(await self._api.get(PODS, self._namespace, name))
        except ApiError as error:
            if error.status == 404:
                self._expectations.gone(name)
            else:
                self._expect(pod)
        except TimeoutError:
            self._expect(pod)

    def _seen(self, pod: Object) -> Pod:
        name: str = pod["spec"].get("nodeName") or ""
        node = self._nodes.get(None, name) if self._nodes is not None and name else None
        seen = pod_of(pod, node)
        return replace(seen, deleting=seen.deleting or self._expectations.is_deleting(pod))


def _foreign(resource: Resource, name: str) -> str:
    kind = resource.plural.removesuffix("s")
    return f"{kind} {name} has the name that this job needs and belongs to another owner: delete or rename it"
