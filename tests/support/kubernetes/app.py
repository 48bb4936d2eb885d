"""A cluster for tests of the whole operator: a real API server, a kubelet that runs nothing, agents without ranks.

The kubelet binds pods, has them run and ends them, through the real API. The agents speak the real protocol over real
sockets with real tokens; their training is a counter that a job's agents share.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt

from pretrain_agent.worker.connection import CoordinatorConnection
from pretrain_agent.worker.report_buffer import ReportBuffer
from pretrain_api.checkpoint.lineage import manifest_key
from pretrain_api.messages import protocol, reports
from pretrain_api.messages.protocol import CoordinatorMessage, Generation, Heartbeat, Hello
from pretrain_api.status.job import JobStatus
from pretrain_operator.kubernetes.client.api import JOBS, PODS, Api, ApiError, Object, Resource
from pretrain_operator.kubernetes.client.informer import Informer
from pretrain_operator.kubernetes.server.options import Options
from pretrain_operator.kubernetes.workload.names import UID_LABEL, WorkerPod, worker_pod
from pretrain_operator.kubernetes.workload.validation import parse_status
from support.kubernetes.jobs import a_job_body
from support.ports import free_port

NAMESPACES = Resource("", "v1", "namespaces")
AUDIENCE = "pretrain-tests"
STEP_SECONDS = 0.03


async def until(condition: Callable[[], Any], seconds: float = 40.0, what: str = "") -> Any:
    """The condition's value, once that is true."""
    try:
        async with asyncio.timeout(seconds):
            while not (value := await _value(condition)):
                await asyncio.sleep(0.02)
            return value
    except TimeoutError:
        raise AssertionError(f"never: {what or condition}") from None


async def _value(condition: Callable[[], Any]) -> Any:
    value = condition()
    return await value if isinstance(value, Awaitable) else value


@dataclass
class Training:
    """What a job's ranks have in common: their steps and their store."""

    until: int
    """They take a checkpoint of this step, and do no other before it is raised."""
    total: int
    step: int = 0
    saved: int = 0
    present: dict[int, set[str]] = field(default_factory=dict[int, set[str]])
    """By number of the generation: the agents whose ranks run."""


class SimAgent:
    """An agent with ranks that only count."""

    def __init__(
        self, url: str, job_uid: str, worker: WorkerPod, token: Path, ca: Path | None, training: Training
    ) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.worker = worker
        self.heard: list[CoordinatorMessage] = []
        self.exited = asyncio.Event()
        self._job_uid = job_uid
        self._training = training
        self._generation: Generation | None = None
        self._highest = 0
        self._held: protocol.Command | None = None
        self._reports = ReportBuffer()
        self._ranks: asyncio.Task[None] | None = None
        self._connection = CoordinatorConnection(
            url, token, ca, self._reports, self.hello, self.heartbeat, self.receive, lambda: 0.0
        )
        self._line = asyncio.create_task(self._connection.run())

    def hello(self) -> Hello:
        return Hello(
            job_uid=self._job_uid,
            slot=self.worker.slot,
            attempt=self.worker.attempt,
            agent_id=self.id,
            host="127.0.0.1",
            generation=self._generation,
            highest_number=self._highest,
            highest_epoch=self._connection.highest_epoch,
            step=self._training.step if self._generation else 0,
        )

    def heartbeat(self) -> Heartbeat:
        generation = self._generation
        return Heartbeat(generation=generation.number if generation else 0, step=self._training.step)

    async def receive(self, message: CoordinatorMessage) -> None:
        self.heard.append(message)
        match message:
            case protocol.HostStore():
                self._highest = max(self._highest, message.number)
                self._connection.send(protocol.StoreReady(number=message.number, port=1))
            case protocol.Formed() if message.generation.number > (self._generation.number if self._generation else 0):
                self._highest = max(self._highest, message.generation.number)
                self._run(message.generation)
            case protocol.Dissolved():
                self._run(None)
            case protocol.Command():
                self._held = message
            case protocol.Shutdown():
                self._run(None)
                self.exited.set()
            case _:
                pass

    async def kill(self) -> None:
        """SIGKILL."""
        self._run(None)
        self._line.cancel()
        await asyncio.wait((self._line,))

    def _run(self, generation: Generation | None) -> None:
        if self._ranks is not None and self._generation is not None:
            self._ranks.cancel()
            self._training.present[self._generation.number].discard(self.id)
        self._generation, self._held = generation, None
        me = next((m for m in generation.members if m.agent_id == self.id), None) if generation else None
        self._ranks = asyncio.create_task(self._train(generation, me.rank)) if generation and me else None

    async def _train(self, generation: Generation, rank: int) -> None:
        training, number = self._training, generation.number
        present = training.present.setdefault(number, set())
        present.add(self.id)
        self._say(number, reports.Started(rank=rank, local_rank=0, pid=100 + rank))
        while len(present) < len(generation.members):
            await asyncio.sleep(STEP_SECONDS)
        if rank == 0:
            training.step = training.saved
            key = manifest_key(number, training.saved) if training.saved else None
            self._say(number, reports.Restored(step=training.saved, checkpoint=key, parameters=7))
        while self._held is None:
            await asyncio.sleep(STEP_SECONDS)
            if len(present) < len(generation.members):
                continue  # a step needs all of them
            if training.step >= training.total:
                self._finish(number, rank)
                return
            if rank == 0 and training.step < training.until:
                self._step(number)
        training.saved = training.step
        key = manifest_key(number, training.step)
        self._say(number, reports.Held(command_id=self._held.id, step=training.step, checkpoint=key))

    def _step(self, number: int) -> None:
        training = self._training
        training.step += 1
        step, key = training.step, manifest_key(number, training.step)
        self._say(
            number,
            reports.StepDone(
                step=step,
                loss=10.0 / step,
                grad_norm=1.0,
                learning_rate=1e-3,
                tokens=step * 100,
                tokens_per_second=100.0,
                seconds=STEP_SECONDS,
            ),
        )
        if step == training.until:
            training.saved = step
            self._say(number, reports.Saved(step=step, checkpoint=key, bytes=1, stall_seconds=0.0, seconds=0.1))

    def _finish(self, number: int, rank: int) -> None:
        """All is done: the ranks exit, the agent waits for the coordinator's word."""
        step = self._training.saved = self._training.step
        if rank == 0:
            key = manifest_key(number, step)
            self._say(number, reports.Finished(step=step, tokens=step * 100, checkpoint=key))
        self._generation = None

    def _say(self, number: int, body: reports.ReportBody) -> None:
        self._reports.add(number, time.time(), body)
        self._connection.report_added(urgent=True)


class Kubelet:
    """All nodes of the cluster in one. It answers for the pods of one namespace."""

    def __init__(
        self, api: Api, namespace: str, url: str, folder: Path, sign: Callable[[Object], str], ca: Path | None
    ) -> None:
        self.answers = True
        """Otherwise it is as good as dead: no pod starts or ends."""
        self.agents: dict[str, SimAgent] = {}
        """By the name of the pod."""
        self.training: dict[str, Training] = {}
        """By the name of the job."""
        self.make_agent: Callable[..., SimAgent] = SimAgent
        self._api = api
        self._namespace = namespace
        self._url = url
        self._folder = folder
        self._sign = sign
        self._ca = ca
        self._informer = Informer(api, PODS, namespace, label_selector=UID_LABEL)
        self._informer.subscribe(self._pod_event)
        self._started: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        try:
            await self._informer.run()
        finally:
            for task in tuple(self._tasks):
                task.cancel()
            for agent in self.agents.values():
                await agent.kill()

    async def kill(self, name: str) -> None:
        """SIGKILL of all processes of a pod, which the API server hears of."""
        await self.agents.pop(name).kill()
        await self.say(name, "Failed", {"terminated": {"exitCode": 137, "reason": "Error"}})

    async def remove(self, name: str) -> None:
        """Somebody deletes the pod without grace."""
        pod = await self._api.get(PODS, self._namespace, name)
        await self._api.delete(PODS, self._namespace, name, uid=pod["metadata"]["uid"], grace_seconds=0)

    async def agent_for(self, pod: Object) -> SimAgent:
        """The agent that runs in a pod."""
        worker = worker_pod(pod)
        assert worker is not None
        token = self._folder / f"{pod['metadata']['uid']}.token"
        token.write_text(self._sign(pod))
        training = self.training[pod["metadata"]["labels"]["pretrain.dev/job"]]
        url = f"{self._url}/v1/jobs/{worker.job_uid}/agents"
        return self.make_agent(url, worker.job_uid, worker, token, self._ca, training)

    def _pod_event(self, kind: str, pod: Object) -> None:
        metadata = pod["metadata"]
        if kind == "DELETED":
            self._spawn(self._forget(metadata["name"]))
        elif not self.answers:
            return
        elif metadata["uid"] not in self._started and "deletionTimestamp" not in metadata:
            self._started.add(metadata["uid"])
            self._spawn(self._start(pod))
        elif "deletionTimestamp" in metadata:
            self._spawn(self._end(pod))

    async def _start(self, pod: Object) -> None:
        metadata, worker = pod["metadata"], worker_pod(pod)
        assert worker is not None
        name = metadata["name"]
        path = PODS.path(self._namespace, name, "binding")
        node = {"apiVersion": "v1", "kind": "Node", "name": f"node-{worker.slot}"}
        await self._call(
            "POST", path, {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": node}
        )
        await self.say(name, "Running", {"running": {}})
        agent = self.agents[name] = await self.agent_for(pod)
        self._spawn(self._wait_for_exit(name, agent))

    async def _wait_for_exit(self, name: str, agent: SimAgent) -> None:
        await agent.exited.wait()
        await agent.kill()
        await self.say(name, "Succeeded", {"terminated": {"exitCode": 0, "reason": "Completed"}})

    async def _end(self, pod: Object) -> None:
        await self._forget(pod["metadata"]["name"])
        uid = pod["metadata"]["uid"]
        await self._api.delete(PODS, self._namespace, pod["metadata"]["name"], uid=uid, grace_seconds=0)

    async def _forget(self, name: str) -> None:
        if (agent := self.agents.pop(name, None)) is not None:
            await agent.kill()

    async def say(self, name: str, phase: str, state: Object) -> None:
        worker = {"name": "worker", "image": "i", "imageID": "", "ready": phase == "Running", "restartCount": 0}
        status = {"phase": phase, "podIP": "127.0.0.1", "containerStatuses": [{**worker, "state": state}]}
        await self._call("PATCH", PODS.path(self._namespace, name, "status"), {"status": status})

    async def _call(self, method: str, path: str, body: Object) -> None:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        with contextlib.suppress(ApiError):  # the pod may be gone
            await self._api._call("test", method, path, body, kind=kind)  # pyright: ignore[reportPrivateUsage]

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@dataclass
class Town:
    """A namespace with its kubelet, and what an operator for it is started with."""

    api: Api
    namespace: str
    kubelet: Kubelet
    options: Options

    async def submit(self, name: str = "gpt2", until: int = 3, total: int = 100, **parts: Any) -> Object:
        """Create a job; its ranks do the steps up to `until`."""
        self.kubelet.training[name] = Training(until, total)
        body = a_job_body(name=name, **parts)
        body["spec"]["training"]["steps"] = total
        return await self.api.create(JOBS, self.namespace, body)

    async def job(self, name: str = "gpt2") -> Object:
        return await self.api.get(JOBS, self.namespace, name)

    async def status(self, name: str = "gpt2") -> JobStatus:
        return parse_status(await self.job(name))

    async def change(self, spec: Object, name: str = "gpt2") -> None:
        await self.api.merge_patch(JOBS, self.namespace, name, {"spec": spec})

    async def delete_job(self, name: str = "gpt2") -> None:
        uid = (await self.job(name))["metadata"]["uid"]
        await self.api.delete(JOBS, self.namespace, name, uid=uid)

    async def pods(self, name: str = "gpt2") -> list[Object]:
        pods, _ = await self.api.list(PODS, self.namespace, label_selector=f"pretrain.dev/job={name}")
        return sorted(pods, key=lambda pod: pod["metadata"]["name"])

    async def reaches(self, phase: str, name: str = "gpt2", step: int = 0) -> JobStatus:
        """The status, once the job is in this phase with so many steps done."""
        last = JobStatus()

        async def there() -> JobStatus | None:
            nonlocal last
            last = await self.status(name)
            return last if last.phase == phase and last.step >= step else None

        try:
            return await until(there)
        except AssertionError:
            raise AssertionError(
                f"{name} is {last.phase} ({last.reason}: {last.message}) at step {last.step}"
            ) from None


@contextlib.asynccontextmanager
async def a_town(api: Api, namespace: str, kubeconfig: Path, folder: Path, **options: Any) -> AsyncIterator[Town]:
    """A namespace of the API server that `kubeconfig` names. `options` replace those of the operator."""
    port = free_port()
    given: dict[str, Any] = {
        "coordinator_host": "127.0.0.1",
        "namespace": namespace,
        "listen": "127.0.0.1",
        "agents_port": port,
        "metrics_port": free_port(),
        "probe_port": free_port(),
        "audience": AUDIENCE,
        "pod_namespace": namespace,
        "kubeconfig": kubeconfig,
        "progress_seconds": 0.5,
        "lease_seconds": 40,  # a machine that is busy with other tests costs no operator its Lease
    }
    sign = await token_signer(api, kubeconfig)
    tls: Path | None = options.get("tls_dir")
    url = f"{'wss' if tls else 'ws'}://127.0.0.1:{port}"
    kubelet = Kubelet(api, namespace, url, folder, sign, tls / "ca.crt" if tls else None)
    running = asyncio.create_task(kubelet.run())
    try:
        yield Town(api, namespace, kubelet, Options(**(given | options)))
    finally:
        running.cancel()
        await asyncio.wait((running,))


async def token_signer(api: Api, kubeconfig: Path) -> Callable[[Object], str]:
    """Signs what the API server would: its key is beside the kubeconfig."""
    key = (kubeconfig.parent / "sa.key").read_text()
    issuer = (await api.read("/.well-known/openid-configuration"))["issuer"]
    key_id = (await api.read("/openid/v1/jwks"))["keys"][0]["kid"]

    def sign(pod: Object) -> str:
        metadata, now = pod["metadata"], int(time.time())
        bound = {
            "namespace": metadata["namespace"],
            "pod": {"name": metadata["name"], "uid": metadata["uid"]},
            "serviceaccount": {"name": "default", "uid": "s"},
        }
        claims = {
            "aud": [AUDIENCE],
            "exp": now + 3600,
            "iat": now,
            "nbf": now,
            "iss": issuer,
            "sub": f"system:serviceaccount:{metadata['namespace']}:default",
            "kubernetes.io": bound,
        }
        return jwt.encode(claims, key, algorithm="RS256", headers={"kid": key_id})

    return sign
