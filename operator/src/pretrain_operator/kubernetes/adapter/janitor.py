"""Removes pods that nobody else would: their kubelet does not answer, their job is gone, or its work is over.

A pod that is deleted by force may run on where nobody sees it. That is safe: the coordinator does not let it in, and
the lineage of the checkpoints shuts it out.
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
"""Beyond its grace a pod's kubelet has so long to end it."""
ORPHAN_SECONDS = 30.0
"""The cluster's own garbage collection has so long from a pod's creation on, and the news of a job to come."""

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
    """None: the pod's own."""


def removals(pods: Iterable[Object], is_at_rest: Callable[[str], bool | None], now: float) -> tuple[Removal, ...]:
    """What should be deleted. `is_at_rest` tells of a job's uid whether its work is over, None: no such job."""
    return tuple(removal for pod in pods if (removal := _judge(pod, is_at_rest, now)) is not None)


def _judge(pod: Object, is_at_rest: Callable[[str], bool | None], now: float) -> Removal | None:
    metadata = pod["metadata"]
    job_uid = owner_uid(pod)
    if not job_uid or metadata.get("finalizers"):
        return None  # not ours, or somebody else has a say in its end
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
    """Goes round again and again."""

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
        """Clean up for ever. All jobs must be known by now."""
        while True:
            for removal in removals(self._pods.all(), self._is_at_rest, self._clock()):
                try:
                    await self._remove(removal)
                except ApiError as error:
                    log.warning("a pod cannot be removed", pod=removal.name, why=removal.why, error=str(error))
            await asyncio.sleep(ROUND_SECONDS)

    async def _remove(self, removal: Removal) -> None:
        if removal.why == "its job is gone" and await self._job_exists(removal):
            return  # its news is on the way
        log.info("removing a pod", namespace=removal.namespace, pod=removal.name, why=removal.why)
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
