"""Agent process: fork server, torchrun thread, coordinator connection, rank sockets and signals."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import structlog

from pretrain_agent.network.addresses import rank_environment
from pretrain_agent.network.metrics_server import WorkerMetrics, http_address, serve_http
from pretrain_agent.settings import AgentSettings
from pretrain_agent.torchrun.dns_workaround import disable_reverse_dns
from pretrain_agent.torchrun.fork_server import WarmForkFailed, fork_once, start_fork_server
from pretrain_agent.torchrun.mailbox import Mailbox
from pretrain_agent.worker.agent import WorkerAgent
from pretrain_agent.worker.connection import CoordinatorConnection
from pretrain_agent.worker.report_buffer import ReportBuffer
from pretrain_sdk.scratch import MEMORY, MEMORY_VARIABLE, Scratch, remove_abandoned

if TYPE_CHECKING:
    from pretrain_agent.torchrun.launch import LaunchObserver

THREAD_SECONDS = 5.0

log = structlog.get_logger()


def run_agent(settings: AgentSettings) -> int:
    """Run a worker until it ends and return its exit code."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    for variable, value in rank_environment(settings.host).items():
        os.environ.setdefault(variable, value)
    with _memory():
        return _run(settings)


@contextmanager
def _memory() -> Generator[None]:
    """Provide a folder in memory that outlives the ranks; without shared memory there is none."""
    os.environ.pop(MEMORY_VARIABLE, None)
    if not os.access(MEMORY, os.W_OK):
        yield
        return
    remove_abandoned(MEMORY)
    with Scratch(MEMORY) as scratch:
        os.environ[MEMORY_VARIABLE] = str(scratch.path)
        yield


def _run(settings: AgentSettings) -> int:
    start_fork_server(settings.preload)
    import pretrain_agent.torchrun.launch  # noqa: F401 - import torch while the fork server imports it too.

    disable_reverse_dns()
    try:
        fork_once(settings.preload)
    except WarmForkFailed as error:
        print(f"pretrain-agent: {error}", file=sys.stderr)
        return 1
    return asyncio.run(_serve(settings, uuid.uuid4().hex))


async def _serve(settings: AgentSettings, agent_id: str) -> int:
    from pretrain_agent.torchrun.launch import RankLauncher
    from pretrain_agent.torchrun.rendezvous import StoreHost

    loop = asyncio.get_running_loop()
    reports, mailbox, metrics = ReportBuffer(), Mailbox(), WorkerMetrics()
    worker = WorkerAgent(
        settings=settings,
        agent_id=agent_id,
        pid=os.getpid(),
        socket_prefix=f"@pretrain-{agent_id}",
        reports=reports,
        mailbox=mailbox,
        stores=StoreHost(settings.host),
        metrics=metrics,
        clock=time.time,
    )
    launcher = RankLauncher(settings, mailbox, _in_loop(loop, worker))
    connection = _connection(settings, reports, worker)
    worker.attach(launcher, connection)
    metrics.connected.set_function(lambda: float(connection.joined.is_set()))
    http = await serve_http(http_address(settings.host), settings.http_port, metrics, lambda: launcher.alive)
    log.info("agent started", slot=settings.slot, attempt=settings.attempt, http=http.addresses, pid=os.getpid())
    _on_signals(loop, worker)
    launcher.start()
    connecting = asyncio.create_task(connection.run())
    code = await worker.exit_code
    connecting.cancel()
    await worker.close()
    await asyncio.to_thread(launcher.join, THREAD_SECONDS)
    await http.cleanup()
    return code


def _connection(settings: AgentSettings, reports: ReportBuffer, worker: WorkerAgent) -> CoordinatorConnection:
    return CoordinatorConnection(
        url=settings.coordinator,
        token_file=settings.token_file,
        ca_file=settings.ca_file,
        reports=reports,
        hello=worker.hello,
        heartbeat=worker.heartbeat,
        receive=worker.receive,
        random=random.random,
    )


def _on_signals(loop: asyncio.AbstractEventLoop, worker: WorkerAgent) -> None:
    leaving: set[asyncio.Task[None]] = set()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: leaving.add(asyncio.create_task(worker.terminate())))


def _in_loop(loop: asyncio.AbstractEventLoop, worker: WorkerAgent) -> LaunchObserver:
    """Wrap the worker for torchrun's thread: calls run in the event loop's thread."""
    return _LoopObserver(loop.call_soon_threadsafe, worker)


class _LoopObserver:
    def __init__(self, call: Callable[..., object], worker: WorkerAgent) -> None:
        self._call = call
        self._worker = worker

    def ranks_started(self, number: int, pids: Mapping[int, int]) -> None:
        self._call(self._worker.ranks_started, number, pids)

    def ranks_ended(self, number: int, exit_codes: Mapping[int, int]) -> None:
        self._call(self._worker.ranks_ended, number, exit_codes)

    def launch_failed(self, number: int, message: str) -> None:
        self._call(self._worker.launch_failed, number, message)
