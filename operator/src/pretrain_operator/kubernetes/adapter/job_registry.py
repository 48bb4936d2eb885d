"""Registry of the jobs that this operator serves, by uid: a recreated job of the same name is another job."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import structlog

from pretrain_operator.kubernetes.adapter.job_controller import Deps, JobController
from pretrain_operator.kubernetes.client.api import Object
from pretrain_operator.kubernetes.workload.names import index_by_job

RESYNC_SECONDS = 300.0
"""Period in which every active job is enqueued once, at a random moment, whatever the watches report."""

log = structlog.get_logger()


class JobRegistry:
    """Starts a controller for every job and stops it when the job is deleted. Event handlers are called by the
    informers, in the event loop."""

    def __init__(
        self,
        deps: Deps,
        serve: Callable[[Object, Deps], JobController] = JobController,
    ) -> None:
        self._deps = deps
        self._serve = serve
        self._controllers: dict[str, JobController] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._node_states: dict[str, object] = {}

    async def resync(self) -> None:
        """Enqueue every active job once per period, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            for controller in self._controllers.values():
                if not controller.at_rest:
                    loop.call_later(self._deps.random() * RESYNC_SECONDS, controller.enqueue)
            await asyncio.sleep(RESYNC_SECONDS)

    async def close(self) -> None:
        """Stop all controllers at once. Agents keep training."""
        await asyncio.gather(*(controller.close() for controller in self._controllers.values()), *self._closing)

    def job_event(self, kind: str, body: Object) -> None:
        """Start, update or stop the controller of a job. A bug with one job does not end the watch of all."""
        metadata = body["metadata"]
        try:
            self._apply(kind, metadata["uid"], body)
        except Exception:
            log.exception("job event failed", kind=kind, namespace=metadata["namespace"], job=metadata["name"])

    def _apply(self, kind: str, uid: str, body: Object) -> None:
        if kind == "DELETED":
            self._deleted(uid)
        elif (controller := self._controllers.get(uid)) is None:
            self._controllers[uid] = self._serve(body, self._deps)
        else:
            controller.changed(body)

    def pod_event(self, _kind: str, pod: Object) -> None:
        """Enqueue the job that owns the pod."""
        for uid in index_by_job(pod):
            if (controller := self._controllers.get(uid)) is not None:
                controller.enqueue()

    def node_event(self, kind: str, node: Object) -> None:
        """Enqueue the jobs with pods on a node whose readiness or schedulability changed."""
        name: str = node["metadata"]["name"]
        state = _state_of(node) if kind != "DELETED" else None
        if state == self._node_states.get(name):
            return
        self._node_states[name] = state
        if state is None:
            del self._node_states[name]
        for pod in self._deps.pods.indexed(on_node(name)):
            self.pod_event("MODIFIED", pod)

    def namespace_of(self, uid: str) -> str | None:
        """Return the namespace of a job; None if there is no such job."""
        controller = self._controllers.get(uid)
        return controller.namespace if controller is not None else None

    def is_at_rest(self, uid: str) -> bool | None:
        """Tell whether a job has ended; None if there is no such job."""
        controller = self._controllers.get(uid)
        return controller.at_rest if controller is not None else None

    def waiting(self) -> int:
        """Return the number of jobs that wait for a reconcile. Thread-safe."""
        return sum(controller.woken_at is not None for controller in tuple(self._controllers.values()))

    def oldest_wait(self) -> float:
        """Return the longest time in seconds that a job has waited for a reconcile. Thread-safe."""
        waits = (controller.woken_at for controller in tuple(self._controllers.values()))
        return max((self._deps.clock() - since for since in waits if since is not None), default=0.0)

    def _deleted(self, uid: str) -> None:
        controller = self._controllers.pop(uid, None)
        if controller is None:
            return
        self._deps.server.forget(uid)
        closing = asyncio.create_task(controller.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        place = controller.namespace, controller.name
        if not any((other.namespace, other.name) == place for other in self._controllers.values()):
            self._deps.metrics.forget(*place)


def on_node(name: str) -> str:
    """Return the pod index value for pods on this node."""
    return f"node/{name}"


def index_of_pod(pod: Object) -> tuple[str, ...]:
    """Return the index values of a pod: the uid of the job whose worker it is, and its node."""
    spec = cast(Object, pod.get("spec") or {})
    node: str | None = spec.get("nodeName")
    return (*index_by_job(pod), *((on_node(node),) if node else ()))


def _state_of(node: Object) -> object:
    """Return the part of a node that matters to workers; the rest changes every few seconds."""
    spec, status = cast(Object, node.get("spec") or {}), cast(Object, node.get("status") or {})
    conditions = cast(list[Object], status.get("conditions") or [])
    ready = next((condition["status"] for condition in conditions if condition["type"] == "Ready"), "Unknown")
    return ready, spec.get("unschedulable", False), "deletionTimestamp" in node["metadata"]
