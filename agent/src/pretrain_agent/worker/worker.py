"""A worker's life between its coordinator and its ranks: which generation runs here, and what is said about it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from pretrain_agent.network.metrics_server import WorkerMetrics
from pretrain_agent.settings import Settings
from pretrain_agent.torchrun.mailbox import Assignment, Mailbox
from pretrain_agent.worker.outbox import Outbox
from pretrain_agent.worker.rank_server import RankServer
from pretrain_api.messages.protocol import (
    AgentMessage,
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
from pretrain_sdk.rank_logs import last_lines, rank_log

EXIT_SIGTERM = 143
DRAIN_SECONDS = 0.2
FLUSH_SECONDS = 1.0
LEAVE_MARGIN = 2.0
"""Seconds of the grace after SIGTERM that are kept for the goodbye."""

log = structlog.get_logger()


class Launcher(Protocol):
    """Runs the ranks of the generation in the mailbox."""

    def kill_ranks(self) -> None:
        """SIGKILL all ranks that run now."""
        ...


class Stores(Protocol):
    """The TCPStores that this agent hosts. Both calls may block for some milliseconds."""

    def listen(self, number: int) -> int:
        """Listen for a generation; the port."""
        ...

    def drop_below(self, number: int) -> None:
        """Stop those of earlier generations."""
        ...


class Line(Protocol):
    """The way to the coordinator."""

    @property
    def highest_epoch(self) -> int:
        """The highest epoch heard."""
        ...

    def send(self, message: AgentMessage) -> None:
        """Send soon."""
        ...

    def report_added(self, *, urgent: bool) -> None:
        """The outbox has something new, to be sent soon or with the next heartbeat."""
        ...

    async def flush(self, timeout: float) -> None:
        """Wait until all is sent."""
        ...


@dataclass
class Run:
    """The generation that runs here now, and what its local ranks have said so far."""

    assignment: Assignment
    server: RankServer
    started: set[int] = field(default_factory=set[int])
    explained: set[int] = field(default_factory=set[int])
    """Ranks that said themselves why they end."""
    stepped: bool = False
    """The first step, which ends a recovery, was told of."""
    held: asyncio.Event = field(default_factory=asyncio.Event)
    """The ranks wait at a step boundary, with a checkpoint in force."""
    rolled_to: int = 0
    """The number that the ranks took by a rollback; 0: none."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def generation(self) -> Generation:
        """The generation."""
        return self.assignment.generation

    @property
    def number(self) -> int:
        """The generation's number."""
        return self.generation.number


class Worker:
    """Follows the coordinator's generations. Everything but `observer` is called in the event loop's thread."""

    def __init__(
        self,
        settings: Settings,
        agent_id: str,
        pid: int,
        socket_prefix: str,
        outbox: Outbox,
        mailbox: Mailbox,
        stores: Stores,
        metrics: WorkerMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._agent_id = agent_id
        self._pid = pid
        self._socket_prefix = socket_prefix
        self._outbox = outbox
        self._mailbox = mailbox
        self._stores = stores
        self._metrics = metrics
        self._clock = clock
        self._launcher: Launcher
        self._line: Line
        self._run: Run | None = None
        self._highest_number = 0
        self._formed_number = 0
        self._step = 0
        self._stepped_at: float | None = None
        """When a rank last said that it got a step further, in the generation that runs."""
        self._step_seconds = 0.0
        self._leaving = False
        self._finished = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def attach(self, launcher: Launcher, line: Line) -> None:
        """Connect both neighbours; before anything else."""
        self._launcher = launcher
        self._line = line

    # --- what the coordinator is told -----------------------------------------------------------------------------

    def hello(self) -> Hello:
        """Who is here and what runs here."""
        return Hello(
            job_uid=self._settings.job_uid,
            slot=self._settings.slot,
            attempt=self._settings.attempt,
            agent_id=self._agent_id,
            host=self._settings.host,
            node=self._settings.node,
            pid=self._pid,
            processes=self._settings.processes,
            generation=self._run.generation if self._run else None,
            highest_number=self._highest_number,
            rolled_to=self._run.rolled_to if self._run else 0,
            highest_epoch=self._line.highest_epoch,
            step=self._step,
            stepped_seconds=None if self._stepped_at is None else max(0.0, self._clock() - self._stepped_at),
            step_seconds=self._step_seconds,
            leaving=self._leaving,
        )

    def heartbeat(self) -> Heartbeat:
        """The newest step."""
        return Heartbeat(generation=self._run.number if self._run else 0, step=self._step)

    # --- what the coordinator says --------------------------------------------------------------------------------

    async def receive(self, message: CoordinatorMessage) -> None:
        """Do what a message asks."""
        match message:
            case HostStore():
                self._highest_number = max(self._highest_number, message.number)
                self._spawn(self._host_store(message.number))
            case Formed():
                await self._follow(message.generation)
            case Dissolved():
                if self._run and message.number >= self._run.number:
                    log.info("generation dissolved", number=message.number, reason=message.reason)
                    self._end_run()
            case Command():
                if self._run and message.generation == self._run.number:
                    self._run.server.command(message)
            case Shutdown():
                log.info("shutdown", reason=message.reason, message=message.message)
                self._exit(0)
            case Error():
                log.warning("the coordinator refused a message", message=message.message)
            case _:
                pass

    async def _follow(self, generation: Generation) -> None:
        if generation.number <= self._formed_number:
            return  # Told again, or late.
        self._formed_number = generation.number
        self._highest_number = max(self._highest_number, generation.number)
        self._end_run()
        self._spawn(asyncio.to_thread(self._stores.drop_below, generation.number))
        member = next((member for member in generation.members if member.agent_id == self._agent_id), None)
        if member is None or self._leaving:
            log.info("not in this generation", number=generation.number)
            return
        await self._start_run(generation, member)

    async def _start_run(self, generation: Generation, member: Member) -> None:
        number = generation.number
        path = f"{self._socket_prefix}-g{number}"
        server = RankServer(
            generation, lambda sender, body: self._take_report(number, sender, body), self._metrics.dropped.inc
        )
        await server.open(path)
        self._finished, self._stepped_at = False, None
        self._run = Run(Assignment(generation, member, path), server)
        self._metrics.generation.set(number)
        self._metrics.restarts.labels(generation.reason).inc()
        self._mailbox.announce(self._run.assignment)
        log.info("generation", number=number, rank=member.rank, workers=len(generation.members))

    def _end_run(self) -> None:
        """Kill the ranks and forget the generation, if there is one."""
        self._mailbox.withdraw()
        self._launcher.kill_ranks()
        if self._run is None:
            return
        self._line.report_added(urgent=True)  # The last steps, which wait for a heartbeat.
        self._run.server.close()
        self._run.ended.set()
        self._run = None
        self._metrics.ranks_gone()

    async def _host_store(self, number: int) -> None:
        try:
            port = await asyncio.to_thread(self._stores.listen, number)
        except Exception as error:  # torch raises RuntimeErrors of its own; without an answer another host is chosen.
            log.error("cannot host the store", host=self._settings.host, error=str(error))
            return
        self._line.send(StoreReady(number=number, port=port))

    # --- what the ranks say ---------------------------------------------------------------------------------------

    def _take_report(self, number: int, sender: Started, body: ReportBody) -> None:
        run = self._run
        if run is None or run.number != number:
            return  # Read from the socket of a generation that is over.
        self._metrics.heard(sender.local_rank, body)
        urgent = True
        match body:
            case Progress():
                self._stepped(body.step)
                return
            case Started():
                self._report_started(run, body)
                return
            case StepDone():
                self._stepped(body.step)
                # Each step alone costs its ranks more CPU, here and at the coordinator, than anybody gains by it.
                urgent, run.stepped = not run.stepped, True
            case Failed() | CheckpointRejected() | NumberTaken():
                run.explained.add(sender.rank)
            case RolledBack():
                self._step = body.rollback.to_step
                run.rolled_to = max(run.rolled_to, body.number)
                self._highest_number = max(self._highest_number, body.number)
            case Diverged(action="Drop"):
                self._step = body.step
            case Held():
                run.held.set()
            case Resumed():
                run.held.clear()
            case _:
                pass
        self._report(run.number, body, urgent=urgent)

    def _stepped(self, step: int) -> None:
        now = self._clock()
        if self._stepped_at is not None and step > self._step:
            self._step_seconds = max(0.0, now - self._stepped_at) / (step - self._step)
        if self._stepped_at is None or step > self._step:
            self._stepped_at = now
        self._step = step

    def _report_started(self, run: Run, started: Started) -> None:
        """Once for each rank: torchrun tells of all, and those that know the agent's socket tell themselves."""
        if started.rank not in run.started:
            run.started.add(started.rank)
            self._metrics.rank_started(started.local_rank, started.pid)
            self._report(run.number, started)

    def _report(self, number: int, body: ReportBody, *, urgent: bool = True) -> None:
        dropped_before = self._outbox.dropped
        self._outbox.add(number, self._clock(), body)
        self._metrics.dropped.inc(self._outbox.dropped - dropped_before)
        self._line.report_added(urgent=urgent)

    # --- what happens to the ranks' processes ---------------------------------------------------------------------

    def ranks_started(self, number: int, pids: Mapping[int, int]) -> None:
        """The processes of a generation run."""
        if self._run is None or self._run.number != number:
            return
        first = self._run.assignment.first_rank
        for local_rank, pid in pids.items():
            self._report_started(self._run, Started(rank=first + local_rank, local_rank=local_rank, pid=pid))

    def ranks_ended(self, number: int, exit_codes: Mapping[int, int]) -> None:
        """All ended well, or some failed."""
        if self._run is not None and self._run.number == number:
            self._spawn(self._conclude(self._run, exit_codes))

    def launch_failed(self, number: int, message: str) -> None:
        """torchrun could not start or watch them."""
        if self._run is not None and self._run.number == number:
            first = self._run.assignment.first_rank
            self._report(number, Failed(rank=first, reason="LaunchFailed", message=message))
            self._end_run()

    async def _conclude(self, run: Run, exit_codes: Mapping[int, int]) -> None:
        for local_rank, code in exit_codes.items():
            await run.server.drain(local_rank, DRAIN_SECONDS)
            rank = run.assignment.first_rank + local_rank
            if code != 0 and rank not in run.explained:
                self._report(run.number, self._failure(run, rank, code))
        if self._run is run:
            self._end_run()
            if not any(exit_codes.values()):
                self._finished = True
                self._spawn(self._stay_a_while())

    def _failure(self, run: Run, rank: int, code: int) -> Failed:
        log.warning("a rank failed", rank=rank, exit_code=code, generation=run.number)
        how = f"killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
        run_dir = self._settings.run_dir
        output = last_lines(rank_log(run_dir, run.number, rank, "err")) if run_dir else ""
        output = output or run.server.last_words.get(rank - run.assignment.first_rank, "")
        return Failed(
            rank=rank,
            exit_code=code,
            reason="Killed" if code == -signal.SIGKILL else "ExitCode",
            message=f"rank {rank}: {how}\n{output}".strip(),
        )

    # --- the end --------------------------------------------------------------------------------------------------

    async def terminate(self) -> None:
        """SIGTERM: have a checkpoint taken at the step boundary, say goodbye, exit; the second time at once."""
        if self._leaving:
            self._exit(EXIT_SIGTERM)
            return
        self._leaving = True
        self._line.send(Leaving())
        if self._run is not None:
            await self._wait_for_checkpoint(self._run)
        self._line.send(Leaving(final=True))
        await self._line.flush(FLUSH_SECONDS)
        self._exit(0 if self._finished else EXIT_SIGTERM)

    async def _wait_for_checkpoint(self, run: Run) -> None:
        if not run.server.connected:
            return  # A program that does not know commands, or one that has done no step yet.
        grace = self._settings.grace
        run.server.command(
            Command(
                epoch=self._line.highest_epoch, id=f"leave-{self._agent_id}", generation=run.number, hold_seconds=grace
            )
        )
        over = [asyncio.create_task(run.held.wait()), asyncio.create_task(run.ended.wait())]
        await asyncio.wait(over, timeout=max(0.0, grace - LEAVE_MARGIN), return_when=asyncio.FIRST_COMPLETED)
        for task in over:
            task.cancel()

    async def _stay_a_while(self) -> None:
        """Done: wait for the coordinator's word, and without one go when it has at least heard everything."""
        await asyncio.sleep(self._settings.grace)
        while self._finished and not self._outbox.is_empty:
            await asyncio.sleep(1.0)
        if self._finished:
            self._exit(0)

    def _exit(self, code: int) -> None:
        self._mailbox.close()
        self._end_run()
        if not self.exit_code.done():
            self.exit_code.set_result(code)

    async def close(self) -> None:
        """End what still runs in the background."""
        for task in self._tasks:
            task.cancel()
        for task in tuple(self._tasks):
            with suppress(asyncio.CancelledError):
                await task

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
