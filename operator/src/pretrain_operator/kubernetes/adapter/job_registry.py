"""All jobs that this operator serves, by uid: a job that is made again under the same name is another one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import structlog

from pretrain_operator.kubernetes.adapter.job_controller import Desk, ServedJob
from pretrain_operator.kubernetes.client.api import JOBS, ApiError, Object
from pretrain_operator.kubernetes.client.backoff import Backoff
from pretrain_operator.kubernetes.workload.names import index_by_job

RESYNC_SECONDS = 300.0
"""Between two lists of all jobs, which find what the watch missed; each service looks again once in this time."""

log = structlog.get_logger()


class Jobs:
    """Starts a service for every job and ends it with the job. `run` begins with a list of all jobs; what the watch
    says is heeded from then on."""

    def __init__(
        self,
        desk: Desk,
        namespace: str | None,
        random: Callable[[], float],
        serve: Callable[[Object, Desk], ServedJob] = ServedJob,
    ) -> None:
        self._desk = desk
        self._namespace = namespace
        self._random = random
        self._serve = serve
        self._served: dict[str, ServedJob] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._gone_meanwhile: set[str] = set()
        """Deleted while a list was on its way, which may still hold them."""
        self._node_states: dict[str, object] = {}
        self.listed = asyncio.Event()
        """All jobs are known."""

    async def run(self) -> None:
        """List all jobs again and again, for ever."""
        backoff = Backoff(self._random)
        while True:
            try:
                await self._list()
                backoff.succeeded()
                self._poke_each_once_until_the_next_list()
                pause = RESYNC_SECONDS
            except ApiError as error:
                log.warning("jobs cannot be listed", reason=error.reason, error=str(error))
                pause = backoff.delay(at_least=error.retry_after)
            await asyncio.sleep(pause)

    async def close(self) -> None:
        """Stop serving, at once; agents go on."""
        await asyncio.gather(*(served.close() for served in self._served.values()), *self._closing)

    def job_event(self, kind: str, body: Object) -> None:
        """The watch told of a job."""
        if kind == "DELETED":
            self._deleted(body["metadata"]["uid"])
        elif self.listed.is_set() and body["metadata"]["uid"] not in self._gone_meanwhile:
            self._exists(body)

    def pod_event(self, _kind: str, pod: Object) -> None:
        """A worker's pod came, changed or went."""
        for uid in index_by_job(pod):
            if (served := self._served.get(uid)) is not None:
                served.poke()

    def node_event(self, kind: str, node: Object) -> None:
        """A node came, changed or went: that matters to the jobs on it if it answers now, or no longer does."""
        name: str = node["metadata"]["name"]
        state = _state_of(node) if kind != "DELETED" else None
        if state == self._node_states.get(name):
            return
        self._node_states[name] = state
        if state is None:
            del self._node_states[name]
        for pod in self._desk.pods.indexed(on_node(name)):
            self.pod_event("MODIFIED", pod)

    def namespace_of(self, uid: str) -> str | None:
        """Where a job lives; None: there is no such job."""
        served = self._served.get(uid)
        return served.namespace if served is not None else None

    def is_at_rest(self, uid: str) -> bool | None:
        """Whether a job's work is over; None: there is no such job."""
        served = self._served.get(uid)
        return served.at_rest if served is not None else None

    def waiting(self) -> int:
        """How many jobs wait to be looked at. Can be asked from any thread."""
        return sum(served.woken_at is not None for served in tuple(self._served.values()))

    def oldest_wait(self) -> float:
        """Seconds that one of them has waited at most. Can be asked from any thread."""
        waits = (served.woken_at for served in tuple(self._served.values()))
        return max((self._desk.clock() - since for since in waits if since is not None), default=0.0)

    async def _list(self) -> None:
        self._gone_meanwhile.clear()
        known = set(self._served)
        bodies, _ = await self._desk.api.list(JOBS, self._namespace)
        found = {cast(str, body["metadata"]["uid"]): body for body in bodies}
        for uid in known - found.keys():
            self._deleted(uid)
        for uid, body in found.items():
            if uid not in self._gone_meanwhile:
                self._exists(body)
        self.listed.set()

    def _exists(self, body: Object) -> None:
        served = self._served.get(body["metadata"]["uid"])
        if served is None:
            self._served[body["metadata"]["uid"]] = self._serve(body, self._desk)
        else:
            served.changed(body)

    def _deleted(self, uid: str) -> None:
        self._gone_meanwhile.add(uid)
        served = self._served.pop(uid, None)
        if served is None:
            return
        self._desk.server.forget(uid)
        closing = asyncio.create_task(served.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        if not any((other.namespace, other.name) == (served.namespace, served.name) for other in self._served.values()):
            self._desk.metrics.forget(served.namespace, served.name)

    def _poke_each_once_until_the_next_list(self) -> None:
        loop = asyncio.get_running_loop()
        for served in self._served.values():
            if not served.at_rest:
                loop.call_later(self._random() * RESYNC_SECONDS, served.poke)


def on_node(name: str) -> str:
    """The value in the index of pods for those on this node."""
    return f"node/{name}"


def index_of_pod(pod: Object) -> tuple[str, ...]:
    """By which pods are found: the job whose worker it is, and its node."""
    spec = cast(Object, pod.get("spec") or {})
    node: str | None = spec.get("nodeName")
    return (*index_by_job(pod), *((on_node(node),) if node else ()))


def _state_of(node: Object) -> object:
    """What of a node matters to workers. The rest changes all the time."""
    spec, status = cast(Object, node.get("spec") or {}), cast(Object, node.get("status") or {})
    conditions = cast(list[Object], status.get("conditions") or [])
    ready = next((condition["status"] for condition in conditions if condition["type"] == "Ready"), "Unknown")
    return ready, spec.get("unschedulable", False), "deletionTimestamp" in node["metadata"]
