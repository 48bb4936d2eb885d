"""Thread with torchrun's agent, which starts and monitors the ranks of each generation."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Mapping
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol, cast

from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.events.api import Event, EventSource
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs, MultiprocessContext
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from pretrain_agent.settings import AgentSettings
from pretrain_agent.system.processes import RunningRanks
from pretrain_agent.torchrun.mailbox import Assignment, Mailbox
from pretrain_agent.torchrun.rank_entry import run_rank
from pretrain_agent.torchrun.rendezvous import BACKEND, MailboxRendezvous
from pretrain_sdk.rank_link import SOCKET_VARIABLE
from pretrain_sdk.rank_logs import LOGS_VARIABLE, rank_log

UNLIMITED_RESTARTS = 2**31
"""The operator enforces the restart budget."""
WATCH_SECONDS = 0.5
"""Longest pause between checks: an exit or a change wakes the thread at once, and polling takes CPU from ranks."""
LOOP_SECONDS = 0.001
"""Sleep of torchrun's loop, in addition to WATCH_SECONDS; must not be 0."""


class LaunchObserver(Protocol):
    """Observer of the ranks' processes; called in torchrun's thread."""

    def ranks_started(self, number: int, pids: Mapping[int, int]) -> None:
        """Handle the start of a generation's ranks: process ids by local rank."""
        ...

    def ranks_ended(self, number: int, exit_codes: Mapping[int, int]) -> None:
        """Handle the end: all exited with 0, or some failed. Exit codes by local rank, negative for signals."""
        ...

    def launch_failed(self, number: int, message: str) -> None:
        """Handle a failed start."""
        ...


class RankLauncher:
    """Starts the ranks of every generation in the mailbox until the mailbox is closed."""

    def __init__(self, settings: AgentSettings, mailbox: Mailbox, observer: LaunchObserver) -> None:
        self._settings = settings
        self._mailbox = mailbox
        self._observer = observer
        self._running = RunningRanks()
        self._thread = threading.Thread(target=self._run, name="torchrun", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        _quiet_torch_logs()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """True while the thread runs."""
        return self._thread.is_alive()

    def kill_ranks(self) -> None:
        """SIGKILL all running ranks. Thread-safe."""
        self._running.kill()

    def join(self, timeout: float) -> None:
        """Wait for the thread to end after the mailbox is closed."""
        self._thread.join(timeout)

    def _run(self) -> None:
        # torchrun's agent ends with a program that succeeds, but a later generation may need this worker again.
        while not self._mailbox.closed:
            rendezvous = _rendezvous(self._settings, self._mailbox)
            agent = GenerationAgent(self._settings, rendezvous, self._mailbox, self._running, self._observer)
            try:
                agent.run()
            except Exception as error:
                logging.getLogger(__name__).exception("torchrun's agent failed")
                number = rendezvous.assignment.generation.number if rendezvous.assignment else 0
                self._observer.launch_failed(number, f"{type(error).__name__}: {error}")


class GenerationAgent(LocalElasticAgent):
    """torchrun's agent with ranks numbered by the generation and woken by events instead of polling."""

    def __init__(
        self,
        settings: AgentSettings,
        rendezvous: MailboxRendezvous,
        mailbox: Mailbox,
        running: RunningRanks,
        observer: LaunchObserver,
    ) -> None:
        spec = WorkerSpec(
            role="rank",
            local_world_size=settings.processes,
            entrypoint=run_rank,
            args=(settings.program,),
            rdzv_handler=rendezvous,
            max_restarts=UNLIMITED_RESTARTS,
            monitor_interval=LOOP_SECONDS,
        )
        super().__init__(spec, RankLogs(settings.run_dir, rendezvous), start_method="forkserver")
        self._rendezvous_handler = rendezvous
        self._mailbox = mailbox
        self._running = running
        self._observer = observer

    @property
    def _assignment(self) -> Assignment:
        assignment = self._rendezvous_handler.assignment
        assert assignment is not None, "torchrun starts ranks after a rendezvous only"
        return assignment

    def _assign_worker_ranks(  # pyright: ignore[reportIncompatibleVariableOverride] - torch's decorator has no types.
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """Assign ranks as the generation says; torchrun would ask all agents over a store and wait for dead ones."""
        first, world_size = self._assignment.first_rank, self._assignment.generation.world_size
        return [
            Worker(local, first + local, first + local, world_size, world_size)
            for local in range(spec.local_world_size)
        ]

    def _start_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> dict[int, Any]:
        number = self._assignment.generation.number
        pids = super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue]
        self._running.replace(pids.values())
        if not self._mailbox.is_current(number):  # It ended while they started, before they could be killed.
            self._running.kill()
        self._observer.ranks_started(number, pids)
        return pids

    def _monitor_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> RunResult:
        number = self._assignment.generation.number
        processes = cast(MultiprocessContext, self._pcontext)._pc.processes  # pyright: ignore[reportOptionalMemberAccess]
        sentinels = [process.sentinel for process in processes if process.exitcode is None]
        connection.wait([*sentinels, self._mailbox.wake_fd], timeout=WATCH_SECONDS)
        self._mailbox.clear_wake()
        if not self._mailbox.is_current(number):
            return RunResult(state=WorkerState.HEALTHY)  # torchrun calls num_nodes_waiting() next and restarts them.
        exit_codes = {i: process.exitcode for i, process in enumerate(processes) if process.exitcode is not None}
        if any(exit_codes.values()):
            self._running.kill()
            self._observer.ranks_ended(number, exit_codes)
        result = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]
        if result.state is WorkerState.HEALTHY and len(exit_codes) == len(processes):
            # Programs that call os._exit(0) never report success to torchrun.
            result = RunResult(WorkerState.SUCCEEDED, {worker.global_rank: None for worker in worker_group.workers})
        if result.state is WorkerState.SUCCEEDED:
            self._observer.ranks_ended(number, dict.fromkeys(range(len(processes)), 0))
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
        """Send SIGKILL: the checkpoint holds all state, and torchrun would wait for a graceful exit."""
        super()._shutdown(signal.SIGKILL, timeout)

    def _exit_barrier(self) -> None:
        """Do nothing: the coordinator knows when all ranks are done."""

    def _construct_event(self, state: str, source: EventSource, *_: Any, **__: Any) -> Event:
        """Return an empty event: torchrun would look up the host's FQDN for each one during a recovery."""
        return Event(f"torchelastic.worker.status.{state}", source=source)


class RankLogs(LogsSpecs):
    """Log files of the ranks, and the variables by which they find their agent.

    Output goes to files if there is a run folder, else to the agent's output. torchrun's `tee` would run two threads
    for each rank and join them in every restart.
    """

    def __init__(self, run_dir: Path | None, rendezvous: MailboxRendezvous) -> None:
        super().__init__()
        self._run_dir = run_dir
        self._rendezvous = rendezvous

    @property
    def root_log_dir(self) -> str:
        """Run folder."""
        return str(self._run_dir or os.devnull)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Name the log files of each local rank. torchrun calls this with the ranks' environments before the start."""
        assignment = self._rendezvous.assignment
        assert assignment is not None, "torchrun starts ranks after a rendezvous only"
        for env in envs.values():
            env[SOCKET_VARIABLE] = assignment.socket_path
            env["TORCHELASTIC_ERROR_FILE"] = ""
            if self._run_dir is not None:
                logs = rank_log(self._run_dir, assignment.generation.number, 0, "out").parent
                env[LOGS_VARIABLE] = str(logs.absolute())
        return LogsDest(
            stdouts={local: self._path(assignment, local, "out") for local in envs},
            stderrs={local: self._path(assignment, local, "err") for local in envs},
            error_files=dict.fromkeys(envs, os.devnull),
        )

    def _path(self, assignment: Assignment, local_rank: int, stream: str) -> str:
        if self._run_dir is None:
            return ""
        path = rank_log(self._run_dir, assignment.generation.number, assignment.first_rank + local_rank, stream)
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)


def _rendezvous(settings: AgentSettings, mailbox: Mailbox) -> MailboxRendezvous:
    params = RendezvousParameters(
        backend=BACKEND,
        endpoint=settings.coordinator,
        run_id=settings.job_uid,
        min_nodes=1,
        max_nodes=1,
        mailbox=mailbox,
    )
    return cast(MailboxRendezvous, get_rendezvous_handler(params))


def _quiet_torch_logs() -> None:
    # torch's formatter imports torch._dynamo for a record with an exception: 1.3 s during a recovery. The agent itself
    # reports the exits that torchrun logs.
    torch_log = logging.getLogger("torch.distributed")
    torch_log.handlers.clear()
    torch_log.setLevel(logging.CRITICAL)
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL)
