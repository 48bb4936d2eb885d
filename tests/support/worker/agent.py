"""A scripted coordinator, agents as real processes, and small programs for them to run."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil
from aiohttp import WSMsgType, web

from pretrain_api.messages.protocol import (
    AGENT_MESSAGE,
    Acked,
    AgentMessage,
    CoordinatorMessage,
    Formed,
    Generation,
    Hello,
    HostStore,
    Joined,
    Member,
    Report,
    StoreReady,
)
from pretrain_api.messages.reports import Progress, Started, StepDone

JOB_UID = "job-1"
WAIT_SECONDS = 120.0

STEPPING_PROGRAM = '''
"""All-reduces for ever; knows its agent: reports each step, and on a command says Held and waits."""
import os, sys, time
import torch, torch.distributed as dist
from pretrain_sdk.rank_link import connect
from pretrain_api.messages.reports import Finished, Held, Progress, Resumed, StepDone

last_step, pause = int(sys.argv[1]), float(sys.argv[2])
rank = int(os.environ["RANK"])
link = connect(rank, int(os.environ["LOCAL_RANK"]), os.environ)
dist.init_process_group("gloo")
step = 0
command = None
while step < last_step:
    asked = torch.zeros(2)
    for command in link.commands() or ():
        asked[1] = 1
        seconds = command.hold_seconds
    asked[0] = 1
    dist.all_reduce(asked)
    assert asked[0] == dist.get_world_size()
    step += 1
    link.report(StepDone(step=step, loss=1.0, grad_norm=1.0, learning_rate=0.1, tokens=step, tokens_per_second=1,
                         seconds=pause) if rank == 0 else Progress(step=step))
    if asked[1]:
        name = command.id if command else ""
        link.report(Held(command_id=name, step=step, checkpoint="c"))
        link.wait_command(60.0)
        link.report(Resumed(command_id=name, step=step))
    print(step, flush=True)
    time.sleep(pause)
dist.barrier()
if rank == 0:
    link.report(Finished(step=step, tokens=step, checkpoint="c"))
link.close()
dist.destroy_process_group()
'''

PLAIN_PROGRAM = '''
"""Knows nothing of the agent: a plain torch.distributed script, which fails when it runs first."""
import os, sys, time
import torch, torch.distributed as dist
out, steps = sys.argv[1], int(sys.argv[2])
if not os.path.exists(out):
    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == 0:
        open(out, "w").close()
        raise ValueError("the first time is bad")
    time.sleep(1000)
dist.init_process_group("gloo")
for step in range(steps):
    total = torch.ones(1)
    dist.all_reduce(total)
    time.sleep(0.01)
with open(f"{out}.{dist.get_rank()}", "w") as file:
    file.write(f"{int(total)} of {os.environ['WORLD_SIZE']}")
'''


def a_member(rank: int, agent_id: str = "", processes: int = 1) -> Member:
    return Member(
        rank=rank, agent_id=agent_id or f"agent-{rank}", slot=rank, attempt=0, host="127.0.0.1", processes=processes
    )


def a_generation(number: int = 1, members: tuple[Member, ...] = (), store_port: int = 1) -> Generation:
    return Generation(
        number=number,
        job_uid=JOB_UID,
        members=members or (a_member(0),),
        store_host="127.0.0.1",
        store_port=store_port,
        reason="Started",
    )


def a_step(step: int) -> StepDone:
    return StepDone(
        step=step, loss=1.0, grad_norm=1.0, learning_rate=0.1, tokens=step, tokens_per_second=1.0, seconds=0.1
    )


async def until(condition: Callable[[], bool], timeout: float = WAIT_SECONDS) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("the condition did not come true in time")
        await asyncio.sleep(0.005)


class Session:
    """One agent's connections, as the scripted coordinator sees them."""

    def __init__(self, hello: Hello, websocket: web.WebSocketResponse) -> None:
        self.hello = hello
        self.websocket = websocket
        self.connected = True
        """False: the coordinator stopped, and the agent has not come back since."""
        self.received: list[tuple[float, AgentMessage]] = []
        self.reports: dict[int, Report] = {}
        self.report_times: dict[int, float] = {}
        self.replayed = 0
        self.step = 0
        self.heartbeats = 0

    def bodies(self, kind: type, generation: int | None = None) -> list:
        return [
            report.body
            for report in self.reports.values()
            if isinstance(report.body, kind) and generation in (None, report.generation)
        ]

    def messages(self, kind: type) -> list:
        return [message for _, message in self.received if isinstance(message, kind)]

    async def send(self, message: CoordinatorMessage) -> None:
        await self.websocket.send_str(message.to_json())


class ScriptedCoordinator:
    """Does only what a test tells it to, besides answering hellos and acknowledging reports."""

    def __init__(self) -> None:
        self.sessions: dict[int, Session] = {}
        self.hellos: list[Hello] = []
        self.acknowledges = True
        self.port = 0
        self.epoch = 0
        self.headers: list[str] = []
        self.refuses = 0
        """The status with which connections are refused, 0: they are taken."""
        self.refused = 0
        self.tls: ssl.SSLContext | None = None
        self.generations: dict[int, Generation] = {}
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"{'wss' if self.tls else 'ws'}://127.0.0.1:{self.port}/agent"

    async def start(self, listener: socket.socket | None = None) -> None:
        """Listen on the loopback, or where the listener does."""
        application = web.Application()
        application.add_routes([web.get("/agent", self._serve)])
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        if listener is not None:
            await web.SockSite(self._runner, listener).start()
            return
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True, ssl_context=self.tls)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        for session in self.sessions.values():
            session.connected = False
            if session.websocket._req is not None and session.websocket._req.transport is not None:
                session.websocket._req.transport.abort()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if self.refuses:
            self.refused += 1
            return web.Response(status=self.refuses, text="no")
        websocket = web.WebSocketResponse()
        self.headers.append(request.headers.get("Authorization", ""))
        await websocket.prepare(request)
        session: Session | None = None
        async for frame in websocket:
            if frame.type is not WSMsgType.TEXT:
                continue
            message = AGENT_MESSAGE.validate_json(frame.data)
            if isinstance(message, Hello):
                session = await self._greet(message, websocket)
            elif session is not None:
                await self._take(session, message)
        return websocket

    async def _greet(self, hello: Hello, websocket: web.WebSocketResponse) -> Session:
        self.hellos.append(hello)
        session = Session(hello, websocket)
        known = self.sessions.get(hello.slot)
        if known is not None and known.hello.agent_id == hello.agent_id:
            session.reports, session.received, session.step = known.reports, known.received, known.step
        self.sessions[hello.slot] = session
        acked = max(session.reports, default=0) if self.acknowledges else 0
        await session.send(Joined(epoch=self.epoch, acked_seq=acked))
        return session

    async def _take(self, session: Session, message: AgentMessage) -> None:
        session.received.append((time.time(), message))
        session.step = max(session.step, getattr(message, "step", 0))
        if isinstance(message, Report):
            session.replayed += message.seq in session.reports
            session.reports[message.seq] = message
            session.report_times[message.seq] = time.time()
            if isinstance(message.body, StepDone | Progress):
                session.step = message.body.step
            if self.acknowledges:
                await session.send(Acked(epoch=self.epoch, seq=message.seq))

    async def form(self, number: int, slots: tuple[int, ...], reason: str = "Started") -> float:
        """Form a generation and return the time at which it was sent to its members."""
        await until(lambda: all(self.sessions[slot].connected for slot in slots))
        sessions = [self.sessions[slot] for slot in slots]
        await sessions[0].send(HostStore(epoch=self.epoch, number=number))
        await until(lambda: any(ready.number == number for ready in sessions[0].messages(StoreReady)))
        port = next(ready.port for ready in sessions[0].messages(StoreReady) if ready.number == number)
        members = tuple(
            Member(
                rank=rank,
                agent_id=session.hello.agent_id,
                slot=session.hello.slot,
                attempt=session.hello.attempt,
                host=session.hello.host,
                processes=session.hello.processes,
            )
            for rank, session in enumerate(sessions)
        )
        generation = Generation(
            number=number, job_uid=JOB_UID, members=members, store_host=members[0].host, store_port=port, reason=reason
        )
        self.generations[number] = generation
        sent = time.time()
        for session in sessions:
            await session.send(Formed(epoch=self.epoch, generation=generation))
        return sent

    async def to_all(self, message: CoordinatorMessage) -> None:
        for session in self.sessions.values():
            await session.send(message)

    async def steps(self, slot: int, number: int, count: int) -> None:
        """Wait until a slot's ranks have reported `count` steps of a generation."""
        await until(lambda: len(self.sessions[slot].bodies(StepDone, number)) >= count)

    def pids(self, slot: int, number: int) -> dict[int, int]:
        return {started.rank: started.pid for started in self.sessions[slot].bodies(Started, number)}


class AgentProcess:
    """An agent, as a process in a group of its own."""

    def __init__(self, url: str, slot: int, program: list[str], folder: Path, *options: str) -> None:
        self.run_dir = folder / f"worker-{slot}"
        self.run_dir.mkdir(parents=True)
        self.log = self.run_dir / "agent.log"
        command = [
            sys.executable, "-m", "pretrain_agent", "--coordinator", url, "--job-uid", JOB_UID, "--slot", str(slot),
            "--attempt", "0", "--grace", "20", *options, "--", *program,
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    def family(self) -> list[psutil.Process]:
        """All processes in the agent's session."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, ProcessLookupError):
                continue
        return found

    def http_port(self) -> int:
        found = re.search(r"http=\[\('127.0.0.1', (\d+)\)\]", self.log.read_text())
        assert found is not None
        return int(found[1])

    async def exit_code(self, timeout: float = WAIT_SECONDS) -> int:
        await until(lambda: self.process.poll() is not None, timeout)
        return self.process.returncode

    def end(self) -> None:
        with suppress(ProcessLookupError):  # Its ranks are in its group, should they have outlived it.
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()


class Field:
    """A coordinator and its agents."""

    def __init__(self, coordinator: ScriptedCoordinator, folder: Path) -> None:
        self.coordinator = coordinator
        self.folder = folder
        self.logs = folder
        self.agents: list[AgentProcess] = []

    def start(self, slot: int, program: list[str], *options: str) -> AgentProcess:
        agent = AgentProcess(self.coordinator.url, slot, program, self.folder, *options)
        self.agents.append(agent)
        return agent

    async def start_all(self, count: int, program: list[str], *options: str) -> list[AgentProcess]:
        """Start agents in slots 0.. and wait until all have joined."""
        agents = [self.start(slot, program, *options) for slot in range(count)]
        await until(lambda: len(self.coordinator.sessions) == count)
        return agents

    def program(self, text: str, name: str = "program.py") -> str:
        path = self.folder / name
        path.write_text(text)
        return str(path)


@asynccontextmanager
async def a_field(folder: Path) -> AsyncIterator[Field]:
    """A coordinator without agents yet; everything ends with the block."""
    coordinator = ScriptedCoordinator()
    await coordinator.start()
    field = Field(coordinator, folder)
    try:
        yield field
    finally:
        for agent in field.agents:
            agent.end()
        await coordinator.stop()
