"""Worker agent: follows the coordinator's generations, runs their ranks and reports on them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any

import structlog

from pretrain_agent.network.metrics_server import WorkerMetrics
from pretrain_agent.settings import AgentSettings
from pretrain_agent.torchrun.mailbox import Assignment, Mailbox
from pretrain_agent.worker.active_generation import ActiveGeneration, StepTracker
from pretrain_agent.worker.ports import CoordinatorSender, RankKiller, RendezvousStores
from pretrain_agent.worker.rank_server import RankServer
from pretrain_agent.worker.report_buffer import ReportBuffer
from pretrain_api.messages.protocol import (
    Command,
    CoordinatorMessage,
    Dissolved,
    Error,
    Formed,
    Generation,
    Heartbeat,
    Hello,
    HostStore,
    Leaving,
    Member,
    Shutdown,
    StoreReady,
)
from pretrain_api.messages.reports import (
    CheckpointRejected,
    Diverged,
    Failed,
    Held,
    NumberTaken,
    Progress,
    ReportBody,
    Resumed,
    RolledBack,
    Started,
    StepDone,
)

EXIT_SIGTERM = 143
DRAIN_SECONDS = 0.2
FLUSH_SECONDS = 1.0
LEAVE_MARGIN = 2.0
"""Seconds of the grace period after SIGTERM that are reserved for the final messages."""

log = structlog.get_logger()


class WorkerAgent:
    """Follows the coordinator's generations. All methods are called in the event loop's thread."""

    def __init__(
        self,
        settings: AgentSettings,
        agent_id: str,
        pid: int,
        socket_prefix: str,
        reports: ReportBuffer,
        mailbox: Mailbox,
        stores: RendezvousStores,
        metrics: WorkerMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._agent_id = agent_id
        self._pid = pid
        self._socket_prefix = socket_prefix
        self._reports = reports
        self._mailbox = mailbox
        self._stores = stores
        self._metrics = metrics
        self._clock = clock
        self._launcher: RankKiller
        self._coordinator: CoordinatorSender
        self._active: ActiveGeneration | None = None
        self._highest_number = 0
        self._formed_number = 0
        self._steps = StepTracker(clock)
        self._leaving = False
        self._finished = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def attach(self, launcher: RankKiller, coordinator: CoordinatorSender) -> None:
        """Connect launcher and coordinator. Must be called first."""
        self._launcher = launcher
        self._coordinator = coordinator

    # --- messages to the coordinator ------------------------------------------------------------------------------

    def hello(self) -> Hello:
        """Describe this agent and the generation that runs here."""
        return Hello(
            job_uid=self._settings.job_uid,
            slot=self._settings.slot,
            attempt=self._settings.attempt,
            agent_id=self._agent_id,
            host=self._settings.host,
            node=self._settings.node,
            pid=self._pid,
            processes=self._settings.processes,
            generation=self._active.generation if self._active else None,
            highest_number=self._highest_number,
            rolled_to=self._active.rolled_to if self._active else 0,
            highest_epoch=self._coordinator.highest_epoch,
            step=self._steps.step,
            stepped_seconds=self._steps.seconds_since_advance,
            step_seconds=self._steps.step_seconds,
            leaving=self._leaving,
        )

    def heartbeat(self) -> Heartbeat:
        """Report the latest step."""
        return Heartbeat(generation=self._active.number if self._active else 0, step=self._steps.step)

    # --- messages from the coordinator ----------------------------------------------------------------------------

    async def receive(self, message: CoordinatorMessage) -> None:
        """Carry out a message."""
        match message:
            case HostStore():
                self._highest_number = max(self._highest_number, message.number)
                self._spawn(self._host_store(message.number))
            case Formed():
                await self._follow(message.generation)
            case Dissolved():
                if self._active and message.number >= self._active.number:
                    log.info("generation dissolved", number=message.number, reason=message.reason)
                    self._end_generation()
            case Command():
                if self._active and message.generation == self._active.number:
                    self._active.server.command(message)
            case Shutdown():
                log.info("shutdown", reason=message.reason, message=message.message)
                self._exit(0)
            case Error():
                log.warning("coordinator refused a message", message=message.message)
            case _:
                pass

    async def _follow(self, generation: Generation) -> None:
        if generation.number <= self._formed_number:
            return  # Repeated, or late.
        self._formed_number = generation.number
        self._highest_number = max(self._highest_number, generation.number)
        self._end_generation()
        self._spawn(asyncio.to_thread(self._stores.drop_below, generation.number))
        member = next((member for member in generation.members if member.agent_id == self._agent_id), None)
        if member is None or self._leaving:
            log.info("not a member of this generation", number=generation.number)
            return
        await self._start_generation(generation, member)

    async def _start_generation(self, generation: Generation, member: Member) -> None:
        number = generation.number
        path = f"{self._socket_prefix}-g{number}"
        server = RankServer(
            generation, lambda sender, body: self._take_report(number, sender, body), self._metrics.dropped.inc
        )
        await server.open(path)
        self._finished = False
        self._steps.restart()
        self._active = ActiveGeneration(Assignment(generation, member, path), server)
        self._metrics.generation.set(number)
        self._metrics.restarts.labels(generation.reason).inc()
        self._mailbox.announce(self._active.assignment)
        log.info("generation", number=number, rank=member.rank, workers=len(generation.members))

    def _end_generation(self) -> None:
        """Kill the ranks and forget the current generation, if any."""
        self._mailbox.withdraw()
        self._launcher.kill_ranks()
        if self._active is None:
            return
        self._coordinator.report_added(urgent=True)  # The last steps are still waiting for a heartbeat.
        self._active.server.close()
        self._active.ended.set()
        self._active = None
        self._metrics.ranks_gone()

    async def _host_store(self, number: int) -> None:
        try:
            port = await asyncio.to_thread(self._stores.listen, number)
        except (
            Exception
        ) as error:  # torch raises plain RuntimeErrors; without an answer the coordinator picks another host.
            log.error("cannot host the rendezvous store", host=self._settings.host, error=str(error))
            return
        self._coordinator.send(StoreReady(number=number, port=port))

    # --- reports of the ranks -------------------------------------------------------------------------------------

    def _take_report(self, number: int, sender: Started, body: ReportBody) -> None:
        active = self._active
        if active is None or active.number != number:
            return  # From the socket of an earlier generation.
        self._metrics.record(sender.local_rank, body)
        urgent = True
        match body:
            case Progress():
                self._steps.advance(body.step)
                return
            case Started():
                self._report_started(active, body)
                return
            case StepDone():
                self._steps.advance(body.step)
                # Sending each step at once costs CPU here and at the coordinator, and nobody needs it sooner.
                urgent, active.stepped = not active.stepped, True
            case Failed() | CheckpointRejected() | NumberTaken():
                active.explained.add(sender.rank)
            case RolledBack():
                self._steps.step = body.rollback.to_step
                active.rolled_to = max(active.rolled_to, body.number)
                self._highest_number = max(self._highest_number, body.number)
            case Diverged(action="Drop"):
                self._steps.step = body.step
            case Held():
                active.held.set()
            case Resumed():
                active.held.clear()
            case _:
                pass
        self._report(active.number, body, urgent=urgent)

    def _report_started(self, active: ActiveGeneration, started: Started) -> None:
        """Report each rank once: torchrun reports all, and ranks that know the socket report themselves."""
        if started.rank not in active.started:
            active.started.add(started.rank)
            self._metrics.rank_started(started.local_rank, started.pid)
            self._report(active.number, started)

    def _report(self, number: int, body: ReportBody, *, urgent: bool = True) -> None:
        dropped_before = self._reports.dropped
        self._reports.add(number, self._clock(), body)
        self._metrics.dropped.inc(self._reports.dropped - dropped_before)
        self._coordinator.report_added(urgent=urgent)

    # --- processes of the ranks ----------------------------------------------------------------------------------

    def ranks_started(self, number: int, pids: Mapping[int, int]) -> None:
        """Report the processes of a generation that started."""
        if self._active is None or self._active.number != number:
            return
        first = self._active.assignment.first_rank
        for local_rank, pid in pids.items():
            self._report_started(self._active, Started(rank=first + local_rank, local_rank=local_rank, pid=pid))

    def ranks_ended(self, number: int, exit_codes: Mapping[int, int]) -> None:
        """Report that all ranks succeeded, or some failed."""
        if self._active is not None and self._active.number == number:
            self._spawn(self._conclude(self._active, exit_codes))

    def launch_failed(self, number: int, message: str) -> None:
        """Report that torchrun could not start or watch the ranks."""
        if self._active is not None and self._active.number == number:
            first = self._active.assignment.first_rank
            self._report(number, Failed(rank=first, reason="LaunchFailed", message=message))
            self._end_generation()

    async def _conclude(self, active: ActiveGeneration, exit_codes: Mapping[int, int]) -> None:
        for local_rank, code in exit_codes.items():
            await active.server.drain(local_rank, DRAIN_SECONDS)
            rank = active.assignment.first_rank + local_rank
            if code != 0 and rank not in active.explained:
                self._report(active.number, active.failure(rank, code, self._settings.run_dir))
        if self._active is active:
            self._end_generation()
            if not any(exit_codes.values()):
                self._finished = True
                self._spawn(self._await_shutdown())

    # --- the end --------------------------------------------------------------------------------------------------

    async def terminate(self) -> None:
        """Take a checkpoint at the step boundary, announce the exit and exit; on the second SIGTERM exit at once."""
        if self._leaving:
            self._exit(EXIT_SIGTERM)
            return
        self._leaving = True
        self._coordinator.send(Leaving())
        if self._active is not None:
            await self._wait_for_checkpoint(self._active)
        self._coordinator.send(Leaving(final=True))
        await self._coordinator.flush(FLUSH_SECONDS)
        self._exit(0 if self._finished else EXIT_SIGTERM)

    async def _wait_for_checkpoint(self, active: ActiveGeneration) -> None:
        if not active.server.connected:
            return  # The program ignores commands, or has done no step yet.
        grace = self._settings.grace
        active.server.command(
            Command(
                epoch=self._coordinator.highest_epoch,
                id=f"leave-{self._agent_id}",
                generation=active.number,
                hold_seconds=grace,
            )
        )
        over = [asyncio.create_task(active.held.wait()), asyncio.create_task(active.ended.wait())]
        await asyncio.wait(over, timeout=max(0.0, grace - LEAVE_MARGIN), return_when=asyncio.FIRST_COMPLETED)
        for task in over:
            task.cancel()

    async def _await_shutdown(self) -> None:
        """Wait for Shutdown after success; without one exit once all reports are acknowledged."""
        await asyncio.sleep(self._settings.grace)
        while self._finished and not self._reports.is_empty:
            await asyncio.sleep(1.0)
        if self._finished:
            self._exit(0)

    def _exit(self, code: int) -> None:
        self._mailbox.close()
        self._end_generation()
        if not self.exit_code.done():
            self.exit_code.set_result(code)

    async def close(self) -> None:
        """Cancel the background tasks."""
        for task in self._tasks:
            task.cancel()
        for task in tuple(self._tasks):
            with suppress(asyncio.CancelledError):
                await task

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
