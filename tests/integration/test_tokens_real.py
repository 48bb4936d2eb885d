"""Tokens that a real API server issued, and forgeries of them, at the agents' door."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jwt
import pytest_asyncio
from aiohttp import ClientSession, WSServerHandshakeError, web
from cryptography.hazmat.primitives import serialization

from pretrain_agent.worker.connection import CoordinatorConnection
from pretrain_agent.worker.report_buffer import ReportBuffer
from pretrain_api.messages.protocol import CoordinatorMessage, Heartbeat, Hello, HostStore
from pretrain_api.spec.job import API_VERSION, KIND
from pretrain_operator.coordinator.server import AgentServer
from pretrain_operator.kubernetes.client.api import PODS, Api, Object, Resource
from pretrain_operator.kubernetes.client.informer import Informer
from pretrain_operator.kubernetes.server.tokens import TokenReview
from pretrain_operator.kubernetes.workload.names import (
    ATTEMPT_LABEL,
    SLOT_LABEL,
    UID_LABEL,
    WORKER_SELECTOR,
    index_by_job,
)
from support.coordinator import a_want
from support.kubernetes.api_server import ApiServer
from support.kubernetes.tls import Authority
from support.kubernetes.tokens import OTHER_KEY
from support.worker.agent import a_step, until

ACCOUNTS = Resource("", "v1", "serviceaccounts")
AUDIENCE, JOB = "pretrain.dev/agents", "5c8d0f1e-0000-4000-8000-000000000001"


class Door:
    """An operator's server for agents before one namespace of a real API server."""

    def __init__(self, api: Api, server: ApiServer, namespace: str) -> None:
        self.api, self._server, self.namespace = api, server, namespace
        self.reasons: list[str] = []
        self.now = time.time
        self.informer = Informer(api, PODS, namespace, label_selector=WORKER_SELECTOR, index=index_by_job)
        review = TokenReview(
            api,
            self.informer,
            AUDIENCE,
            lambda uid: namespace if uid == JOB else None,
            self.reasons.append,
            lambda: self.now(),
        )
        self.agents = AgentServer(review)
        self.channel = self.agents.open(JOB, epoch=1, highest_number=0)
        self.channel.set_want(a_want(frozenset({(0, 0)}), replicas=1))
        self.url = ""

    async def open(self, tls: Any = None) -> web.AppRunner:
        runner = web.AppRunner(self.agents.application(), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        port = runner.addresses[0][1]
        self.url = f"{'wss' if tls else 'ws'}://127.0.0.1:{port}/v1/jobs/{JOB}/agents"
        return runner

    async def a_pod(self, name: str, job: str = JOB, slot: int = 0, seen: bool = True) -> Object:
        """A worker's pod; `seen`: the informer shows it."""
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "labels": {UID_LABEL: job, SLOT_LABEL: str(slot), ATTEMPT_LABEL: "0"},
                "ownerReferences": [
                    {"apiVersion": API_VERSION, "kind": KIND, "name": "j", "uid": job, "controller": True}
                ],
            },
            "spec": {
                "serviceAccountName": "worker",
                "automountServiceAccountToken": False,
                "containers": [{"name": "worker", "image": "none"}],
            },
        }
        pod = await self.api.create(PODS, self.namespace, body)
        if seen:
            await until(lambda: self.informer.get(self.namespace, name) is not None)
        return pod

    def a_token(self, pod: Object | None = None, audience: str | None = AUDIENCE) -> str:
        """A token of the API server, bound to a pod if one is given."""
        bound: list[str] = []
        if pod is not None:
            name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
            bound = ["--bound-object-kind=Pod", f"--bound-object-name={name}", f"--bound-object-uid={uid}"]
        audiences = [f"--audience={audience}"] if audience else []
        made = self._server.kubectl(
            "create", "token", "worker", f"--namespace={self.namespace}", "--duration=10m", *audiences, *bound
        )
        return made.strip()

    async def lets_in(self, token: str, job: str = JOB) -> bool:
        """Whether a caller is taken."""
        return await self.answer(token, job) == 101

    async def answer(self, token: str | None, job: str = JOB) -> int:
        """The HTTP status that a caller gets."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        async with ClientSession() as session:
            try:
                async with session.ws_connect(self.url.replace(JOB, job), headers=headers):
                    return 101
            except WSServerHandshakeError as error:
                return error.status

    async def refuses(self, token: str | None, job: str = JOB) -> tuple[int, str]:
        """The status and the reason."""
        self.reasons.clear()
        return await self.answer(token, job), ", ".join(self.reasons)


@pytest_asyncio.fixture
async def door(api: Api, server: ApiServer, namespace: str) -> AsyncIterator[Door]:
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "worker"}}
    await api.create(ACCOUNTS, namespace, account)
    made = Door(api, server, namespace)
    watching = asyncio.create_task(made.informer.run())
    await made.informer.synced()
    runner = await made.open()
    yield made
    watching.cancel()
    await runner.cleanup()


def parts(token: str) -> list[Any]:
    return [json.loads(base64.urlsafe_b64decode(part + "==")) for part in token.split(".")[:2]]


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unsigned(header: dict[str, Any], claims: dict[str, Any]) -> str:
    return ".".join(encoded(json.dumps(part).encode()) for part in (header, claims))


async def test_the_token_of_a_live_pod_lets_its_bearer_in(door: Door) -> None:
    assert await door.lets_in(door.a_token(await door.a_pod("a")))
    assert door.reasons == []


async def test_a_pod_that_the_informer_has_not_shown_yet_is_let_in(door: Door) -> None:
    blind = Door(door.api, door._server, door.namespace)  # Its informer never ran.
    runner = await blind.open()

    assert await blind.lets_in(blind.a_token(await blind.a_pod("a", seen=False)))
    await runner.cleanup()


async def test_another_audience_is_refused(door: Door) -> None:
    pod = await door.a_pod("a")

    assert await door.refuses(door.a_token(pod, "another")) == (401, "wrong audience")
    assert await door.refuses(door.a_token(pod, None)) == (401, "wrong audience")


async def test_an_expired_token_is_refused(door: Door) -> None:
    token = door.a_token(await door.a_pod("a"))
    door.now = lambda: time.time() + 3600

    assert await door.refuses(token) == (401, "expired")


async def test_a_token_that_is_bound_to_no_pod_is_refused(door: Door) -> None:
    assert await door.refuses(door.a_token()) == (401, "not bound to a pod")


async def test_a_token_outlives_its_pod_in_vain(door: Door) -> None:
    pod = await door.a_pod("a")
    token = door.a_token(pod)
    await door.api.delete(PODS, door.namespace, "a", uid=pod["metadata"]["uid"], grace_seconds=0)
    await until(lambda: door.informer.get(door.namespace, "a") is None)
    assert await door.refuses(token) == (403, "no such pod")

    await door.a_pod("a")  # Another of its name.
    assert await door.refuses(token) == (403, "no such pod")


async def test_a_pod_that_has_ended_is_refused(door: Door) -> None:
    pod = await door.a_pod("a")
    token = door.a_token(pod)
    door._server.kubectl(
        "patch", "pod", "a", f"--namespace={door.namespace}", "--subresource=status", "-p",
        json.dumps({"status": {"phase": "Failed"}}),
    )  # fmt: skip
    await until(lambda: door.informer.get(door.namespace, "a")["status"]["phase"] == "Failed")  # type: ignore[index]

    assert await door.refuses(token) == (403, "pod ended")


async def test_a_pod_of_another_job_is_refused(door: Door) -> None:
    pod = await door.a_pod("a", job="another")

    assert await door.refuses(door.a_token(pod)) == (403, "another job")


async def test_a_worker_of_a_job_that_is_not_served_here_is_told_so_after_it_proved_itself(door: Door) -> None:
    token = door.a_token(await door.a_pod("a", job="unserved"))

    assert await door.refuses(token, "unserved") == (404, "")
    assert await door.refuses("bad", "unserved") == (401, "not a token")


async def test_forgeries_of_a_good_token_are_refused(door: Door) -> None:
    token = door.a_token(await door.a_pod("a"))
    header, claims = parts(token)
    (key,) = (await door.api.read("/openid/v1/jwks"))["keys"]
    public = jwt.PyJWK(key).key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    symmetric = unsigned({**header, "alg": "HS256"}, claims)
    symmetric += "." + encoded(hmac.new(public, symmetric.encode(), hashlib.sha256).digest())

    assert await door.refuses(None) == (401, "no token")
    assert await door.refuses("garbage") == (401, "not a token")
    assert await door.refuses(unsigned({**header, "alg": "none"}, claims) + ".") == (401, "not a token")
    assert await door.refuses(symmetric) == (401, "not a token")
    other = {"kid": header["kid"]}
    assert await door.refuses(jwt.encode(claims, OTHER_KEY, "RS256", other)) == (401, "bad signature")
    assert await door.refuses(jwt.encode(claims, OTHER_KEY, "RS256", {"kid": "x"})) == (401, "unknown key")
    changed = unsigned(header, {**claims, "exp": claims["exp"] + 1}) + "." + token.rsplit(".", 1)[1]
    assert await door.refuses(changed) == (401, "bad signature")
    assert await door.lets_in(token)


async def test_an_agent_with_its_pods_token_reports_over_tls(door: Door, tmp_path: Path) -> None:
    authority = Authority()
    (tmp_path / "ca.crt").write_text(authority.pem)
    (tmp_path / "token").write_text(door.a_token(await door.a_pod("a")))
    runner = await door.open(authority.server(tmp_path, "127.0.0.1"))
    heard: list[CoordinatorMessage] = []
    reports = ReportBuffer()

    async def hear(message: CoordinatorMessage) -> None:
        heard.append(message)

    agent = CoordinatorConnection(
        url=door.url,
        token_file=tmp_path / "token",
        ca_file=tmp_path / "ca.crt",
        reports=reports,
        hello=lambda: Hello(job_uid=JOB, slot=0, attempt=0, agent_id="a", host="10.0.0.1"),
        heartbeat=Heartbeat,
        receive=hear,
        random=lambda: 0.5,
    )
    running = asyncio.create_task(agent.run())
    reports.add(1, 0.0, a_step(1))
    agent.report_added(urgent=True)
    await until(lambda: any(isinstance(message, HostStore) for message in heard) and reports.is_empty)
    running.cancel()
    await runner.cleanup()
