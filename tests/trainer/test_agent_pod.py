"""Agents where pods would have them: process 1, an address of their own, a read-only root, no home, no DNS."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio

from pretrain_api.messages.protocol import Leaving
from pretrain_api.messages.reports import Held
from support.worker.agent import JOB_UID, STEPPING_PROGRAM, ScriptedCoordinator, until
from support.worker.pods import GATEWAY, PLACE, Network, Pod, a_network

pytestmark = pytest.mark.usefixtures("namespaces")

HEALTH = "import urllib.request as r, sys; print(r.urlopen(sys.argv[1], timeout=10).read().decode())"
LISTENER = """
import asyncio, sys
from pretrain_agent.worker import connection
from pretrain_agent.worker.report_buffer import ReportBuffer
from pretrain_api.messages.protocol import Heartbeat, Hello

connection.UNANSWERED = 1e6  # It alone would find out, too late.

async def listen():
    async def receive(message):
        pass
    hello = Hello(job_uid="job-1", slot=0, attempt=0, agent_id="a", host="h")
    line = connection.CoordinatorConnection(
        sys.argv[1], None, None, ReportBuffer(), lambda: hello, Heartbeat, receive, lambda: 0.5
    )
    running = asyncio.create_task(line.run())
    while True:
        await line.joined.wait()
        print("joined", flush=True)
        while line.joined.is_set():
            await asyncio.sleep(0.01)
        print("lost", flush=True)

asyncio.run(listen())
"""


class Field:
    """A coordinator that agents in pods can reach."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.coordinator = ScriptedCoordinator()
        (network.folder / "program.py").write_text(STEPPING_PROGRAM)

    async def open(self) -> None:
        listener = self.network.listen()
        self.url = f"ws://{GATEWAY}:{listener.getsockname()[1]}/agent"
        await self.coordinator.start(listener)

    def start(self, *options: str) -> Pod:
        slot = len(self.network.pods)
        return self.network.start(
            sys.executable, "-m", "pretrain_agent", "--coordinator", self.url, "--job-uid", JOB_UID,
            "--slot", str(slot), "--attempt", "0", "--host", "{address}", "--http-port", "9400",
            "--run-dir", "/tmp/pretrain", "--grace", "20", *options,
            "--", f"{PLACE}/program.py", "1000000", "0.01",
        )  # fmt: skip

    async def trains(self, workers: int, *options: str) -> list[Pod]:
        pods = [self.start(*options) for _ in range(workers)]
        try:
            await until(lambda: len(self.coordinator.sessions) == workers)
            await self.coordinator.form(1, tuple(range(workers)))
            await self.coordinator.steps(0, 1, 3)
        except AssertionError as error:
            raise AssertionError("\n".join(pod.log.read_text() for pod in pods)) from error
        return pods


@pytest_asyncio.fixture
async def field() -> AsyncIterator[Field]:
    with a_network() as network:
        made = Field(network)
        await made.open()
        yield made
        await made.coordinator.stop()


async def exit_code(pod: Pod) -> int:
    await until(lambda: pod.process.poll() is not None)
    return pod.process.returncode


async def test_workers_in_pods_train_together_and_show_their_metrics(field: Field) -> None:
    pods = await field.trains(2, "--preload", "pretrain_trainer.preload")

    assert [field.coordinator.sessions[slot].hello.host for slot in range(2)] == [pod.address for pod in pods]
    for host in (pods[1].address, "127.0.0.1"):
        assert pods[1].inside(sys.executable, "-c", HEALTH, f"http://{host}:9400/healthz").strip() == "ok"
    assert field.network.questions() == 0, "DNS stood in the way"


async def test_a_pod_that_is_deleted_takes_a_checkpoint_and_says_goodbye(field: Field) -> None:
    (pod,) = await field.trains(1)

    os.kill(pod.first.pid, signal.SIGTERM)

    assert await exit_code(pod) == 143
    session = field.coordinator.sessions[0]
    assert len(session.bodies(Held)) == 1
    assert [message.final for message in session.messages(Leaving)] == [False, True]


async def test_an_agent_that_is_killed_takes_its_container_with_it(field: Field) -> None:
    (pod,) = await field.trains(1)
    family = pod.first.children(recursive=True)
    agent = pod.agent
    assert agent is not None

    agent.kill()

    assert await exit_code(pod) == 137
    await until(lambda: not any(psutil.pid_exists(process.pid) for process in family))


async def test_a_pod_that_is_deleted_while_it_starts_ends_at_once(field: Field) -> None:
    pod = field.start()
    await until(lambda: pod.agent is not None)

    os.kill(pod.first.pid, signal.SIGTERM)

    assert await exit_code(pod) == 143
    assert not field.coordinator.hellos


async def test_a_silently_cut_network_is_noticed_by_what_is_not_confirmed(field: Field) -> None:
    pod = field.network.start(sys.executable, "-c", LISTENER, field.url)

    async def said(*words: str) -> None:
        await until(lambda: [word for word in pod.log.read_text().split() if word in ("joined", "lost")] == [*words])

    await said("joined")
    field.network.cut(pod)
    await said("joined", "lost")
    field.network.heal(pod)
    await said("joined", "lost", "joined")
