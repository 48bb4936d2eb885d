"""Conversion of Kubernetes pods into the Pod of the Cluster port."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import cast

from pretrain_operator.cluster import Pod, PodPhase
from pretrain_operator.kubernetes.client.api import Object
from pretrain_operator.kubernetes.workload.names import worker_pod

WORKER = "worker"
"""Name of the container that runs the agent."""
_IN_ORDER = ("", "ContainerCreating", "PodInitializing")
"""Waiting reasons of a container that starts normally."""
_DISRUPTIONS = {
    "PreemptionByScheduler": "Preempted",
    "EvictionByEvictionAPI": "Evicted",
    "TerminationByKubelet": "Evicted",
    "DeletionByTaintManager": "NodeLost",
    "DeletionByPodGC": "NodeLost",
}
"""`Pod.reason` by the reason of the condition DisruptionTarget."""


def pod_of(pod: Object, node: Object | None) -> Pod:
    """Convert a worker's pod (see `names.worker_pod`), with its node if that can be read."""
    worker = worker_pod(pod)
    assert worker is not None, "not a worker's pod"
    metadata, status = pod["metadata"], _mapping(pod, "status")
    state = _worker_state(status)
    phase = _phase(status, state)
    deleting = "deletionTimestamp" in metadata
    reason, message = _why(status, state, phase, deleting=deleting)
    ended = _mapping(state, "terminated")
    return Pod(
        slot=worker.slot,
        attempt=worker.attempt,
        phase=phase,
        node=_mapping(pod, "spec").get("nodeName") or "",
        deleting=deleting,
        created_at=_seconds(metadata.get("creationTimestamp")) or 0.0,
        finished_at=None if phase in ("Pending", "Running") else _finished_at(status, ended),
        exit_code=ended.get("exitCode"),
        reason=reason,
        message=message,
        node_ready=None if node is None else _is_true(_condition(_mapping(node, "status"), "Ready")),
    )


def _phase(status: Object, state: Object) -> PodPhase:
    """Return the phase of the worker's container. The pod's also depends on sidecars, and is Unknown on a lost node."""
    if "terminated" in state:
        return "Succeeded" if state["terminated"].get("exitCode") == 0 else "Failed"
    phase = status.get("phase", "Pending")
    if phase in ("Succeeded", "Failed"):
        return phase
    return "Running" if "running" in state or phase in ("Running", "Unknown") else "Pending"


def _why(status: Object, state: Object, phase: PodPhase, *, deleting: bool) -> tuple[str, str]:
    """Return reason and message of its end, its deletion or its waiting."""
    if phase == "Pending":
        return _waits_for(status)
    disruption = _condition(status, "DisruptionTarget")
    if phase == "Running":
        return _disrupted(disruption) if deleting and _is_true(disruption) else ("", "")
    ended = _mapping(state, "terminated")
    message = ended.get("message") or status.get("message") or ""
    if phase == "Succeeded" or ended.get("reason") == "OOMKilled":
        return ended.get("reason") or "Completed", message
    if status.get("reason"):
        return status["reason"], status.get("message") or message
    if _is_true(disruption):
        return _disrupted(disruption)
    return ended.get("reason") or "Error", message


def _waits_for(status: Object) -> tuple[str, str]:
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        return scheduled.get("reason") or "Unschedulable", scheduled.get("message") or ""
    for container in _containers(status):
        waiting = _mapping(_mapping(container, "state"), "waiting")
        if waiting.get("reason", "") not in _IN_ORDER:
            return waiting["reason"], waiting.get("message") or ""
    return "", ""


def _disrupted(condition: Object) -> tuple[str, str]:
    reason = condition.get("reason") or ""
    return _DISRUPTIONS.get(reason, reason or "Disrupted"), condition.get("message") or ""


def _finished_at(status: Object, ended: Object) -> float | None:
    """Return the end of the worker; if its node never reported one, the time when the pod was given up."""
    if (moment := _seconds(ended.get("finishedAt"))) is not None:
        return moment
    moments = (_condition(status, kind).get("lastTransitionTime") for kind in ("DisruptionTarget", "Ready"))
    return next((_seconds(moment) for moment in moments if moment), None)


def _worker_state(status: Object) -> Object:
    """Return the state of the worker's container; empty: none yet."""
    for container in _items(status, "containerStatuses"):
        if container.get("name") == WORKER:
            return _mapping(container, "state")
    return {}


def _containers(status: Object) -> Iterator[Object]:
    """Yield container statuses in start order, the worker's before sidecars."""
    yield from _items(status, "initContainerStatuses")
    yield from sorted(_items(status, "containerStatuses"), key=lambda item: item.get("name") != WORKER)


def _condition(status: Object, kind: str) -> Object:
    for condition in _items(status, "conditions"):
        if condition.get("type") == kind:
            return condition
    return {}


def _is_true(condition: Object) -> bool:
    return condition.get("status") == "True"


def _mapping(parent: Object, key: str) -> Object:
    """Return a mapping that may be absent or null."""
    return cast(Object, parent.get(key) or {})


def _items(parent: Object, key: str) -> list[Object]:
    return cast(list[Object], parent.get(key) or [])


def _seconds(moment: str | None) -> float | None:
    """Convert a Kubernetes time to Unix seconds."""
    return None if not moment else datetime.fromisoformat(moment).timestamp()
