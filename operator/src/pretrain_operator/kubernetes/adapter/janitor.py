"""Deletion of pods that no controller deletes: kubelet gone, job gone, or job ended.

A pod that is deleted by force may keep running on a partitioned node. That is safe: the coordinator does not admit it,
and the checkpoint lineage excludes what it writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, cast

import structlog

from pretrain_operator.kubernetes.client.api import JOBS, PODS, Api, ApiError, Object
from pretrain_operator.kubernetes.client.informer import Informer
from pretrain_operator.kubernetes.workload.names import owner_uid

ROUND_SECONDS = 5.0
OVERDUE_SECONDS = 5.0
"""Time beyond the grace period for the kubelet to end a pod."""
ORPHAN_SECONDS = 30.0
"""Age from which a pod without a job counts as an orphan: garbage collection and the watch of jobs come first."""

Why = Literal["its kubelet does not answer", "its job is gone", "its job's work is over"]
log = structlog.get_logger()


@dataclass(frozen=True)
class Removal:
    """A pod to delete."""

    namespace: str
    name: str
    uid: str
    job: str
    """Name of the job that owns it."""
    job_uid: str
    why: Why
    grace_seconds: int | None
    """Grace period of the deletion; None: the pod's own."""


def removals(pods: Iterable[Object], is_at_rest: Callable[[str], bool | None], now: float) -> tuple[Removal, ...]:
    """Return the pods to delete. `is_at_rest` tells whether the job of a uid has ended; None: no such job."""
    return tuple(removal for pod in pods if (removal := _judge(pod, is_at_rest, now)) is not None)


def _judge(pod: Object, is_at_rest: Callable[[str], bool | None], now: float) -> Removal | None:
    metadata = pod["metadata"]
    job_uid = owner_uid(pod)
    if not job_uid or metadata.get("finalizers"):
        return None  # not ours, or a finalizer decides about its end
    if (deadline := metadata.get("deletionTimestamp")) is not None:
        return _removal(pod, "its kubelet does not answer", 0) if _seconds(deadline) + OVERDUE_SECONDS < now else None
    at_rest = is_at_rest(job_uid)
    if at_rest is None:
        old = _seconds(metadata["creationTimestamp"]) + ORPHAN_SECONDS < now
        return _removal(pod, "its job is gone", None) if old else None
    status = cast(Object, pod.get("status") or {})
    alive = status.get("phase", "Pending") in ("Pending", "Running", "Unknown")
    return _removal(pod, "its job's work is over", None) if at_rest and alive else None


class Janitor:
    """Periodic deletion of the pods in `removals`."""

    def __init__(
        self,
        api: Api,
        pods: Informer,
        is_at_rest: Callable[[str], bool | None],
        clock: Callable[[], float],
    ) -> None:
        self._api = api
        self._pods = pods
        self._is_at_rest = is_at_rest
        self._clock = clock

    async def run(self) -> None:
        """Clean up until cancelled. Start it only when all jobs are known."""
        while True:
            for removal in removals(self._pods.all(), self._is_at_rest, self._clock()):
                try:
                    await self._remove(removal)
                except ApiError as error:
                    log.warning("cannot delete pod", pod=removal.name, why=removal.why, error=str(error))
            await asyncio.sleep(ROUND_SECONDS)

    async def _remove(self, removal: Removal) -> None:
        if removal.why == "its job is gone" and await self._job_exists(removal):
            return  # its ADDED event is on the way
        log.info("deleting pod", namespace=removal.namespace, pod=removal.name, why=removal.why)
        await self._api.delete(
            PODS, removal.namespace, removal.name, uid=removal.uid, grace_seconds=removal.grace_seconds
        )

    async def _job_exists(self, removal: Removal) -> bool:
        try:
            job = await self._api.get(JOBS, removal.namespace, removal.job)
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return job["metadata"]["uid"] == removal.job_uid


def _removal(pod: Object, why: Why, grace_seconds: int | None) -> Removal:
    metadata = pod["metadata"]
    owner = next(reference for reference in metadata["ownerReferences"] if reference.get("controller"))
    return Removal(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        job=owner["name"],
        job_uid=owner["uid"],
        why=why,
        grace_seconds=grace_seconds,
    )


def _seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()
