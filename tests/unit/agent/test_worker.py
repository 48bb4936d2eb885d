"""The worker's decisions, with real Unix sockets and no processes."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from pretrain_agent.network.metrics_server import WorkerMetrics
from pretrain_agent.settings import AgentSettings, TrainingProgram
from pretrain_agent.torchrun.mailbox import Mailbox
from pretrain_agent.worker.agent import WorkerAgent
from pretrain_agent.worker.report_buffer import ReportBuffer
from pretrain_api.base import Wire
from pretrain_api.messages.protocol import (
    AgentMessage,
    Command,
    Dissolved,
    Formed,
    HostStore,
    Leaving,
    Shutdown,
    StoreReady,
)
from pretrain_api.messages.reports import Failed, Finished, Held, Progress, Resumed, Started, StepDone
from support.worker.agent import JOB_UID, a_generation, a_member, a_step, until

ME = a_member(0, "me", processes=2)
PEER = a_member(1, "peer")


class FakeLauncher:
    def __init__(self) -> None:
        self.kills = 0

    def kill_ranks(self) -> None:
        self.kills += 1


class FakeStores:
    def __init__(self) -> None:
        self.dropped_below = 0

    def listen(self, number: int) -> int:
        if number == 13:
            raise RuntimeError("no such address")
        return 1000 + number

    def drop_below(self, number: int) -> None:
        self.dropped_below = number


class FakeLine:
    highest_epoch = 4

    def __init__(self) -> None:
        self.sent: list[AgentMessage] = []
        self.urgent: list[bool] = []

    def send(self, message: AgentMessage) -> None:
        self.sent.append(message)

    def report_added(self, *, urgent: bool) -> None:
        self.urgent.append(urgent)

    async def flush(self, timeout: float) -> None:
        pass


class Bench:
    """A worker between fakes."""

    def __init__(self, folder: Path) -> None:
        self.now = 12.0
        self.reports, self.mailbox, self.stores = ReportBuffer(), Mailbox(), FakeStores()
        self.launcher, self.line = FakeLauncher(), FakeLine()
        self.worker = WorkerAgent(
            settings=AgentSettings(
                coordinator="ws://c",
                job_uid=JOB_UID,
                slot=0,
                attempt=0,
                program=TrainingProgram("x", False, ()),
                processes=2,
                grace=2.2,
                run_dir=folder,
            ),
            agent_id="me",
            pid=1,
            socket_prefix=f"{folder}/s",
            reports=self.reports,
            mailbox=self.mailbox,
            stores=self.stores,
            metrics=WorkerMetrics(),
            clock=lambda: self.now,
        )
        self.worker.attach(self.launcher, self.line)

    async def form(self, number: int = 1) -> None:
        await self.worker.receive(Formed(generation=a_generation(number, (ME, PEER))))

    def bodies(self, kind: type) -> list:
        return [report.body for report in self.reports.after(0) if isinstance(report.body, kind)]

    async def rank(self, local_rank: int = 0) -> Rank:
        path = self.mailbox.take().socket_path
        return await Rank.connect(path, local_rank)


class Rank:
    """A rank's end of the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, path: str, local_rank: int) -> Rank:
        rank = cls(*await asyncio.open_unix_connection(path))
        rank.say(Started(rank=local_rank, local_rank=local_rank, pid=50 + local_rank))
        await rank.hear()
        return rank

    def say(self, body: Wire) -> None:
        self.writer.write(body.to_json().encode() + b"\n")

    async def hear(self) -> dict:
        return json.loads(await asyncio.wait_for(self.reader.readline(), 20))


@pytest_asyncio.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    await made.worker.receive(Shutdown(reason="removed"))
    await made.worker.close()


async def test_a_generation_with_this_agent_is_handed_to_torchrun(bench: Bench) -> None:
    await bench.form(3)

    assert bench.mailbox.take().generation.number == 3
    hello = bench.worker.hello()
    assert (hello.generation, hello.highest_number, hello.highest_epoch) == (a_generation(3, (ME, PEER)), 3, 4)
    await until(lambda: bench.stores.dropped_below == 3)


async def test_a_hello_tells_when_the_last_step_was_and_how_long_it_took(bench: Bench) -> None:
    await bench.form(3)
    rank = await bench.rank()
    assert bench.worker.hello().stepped_seconds is None
    for step in (5, 7):
        bench.now += 4.0
        rank.say(Progress(step=step))
        await until(lambda step=step: bench.worker.heartbeat().step == step)
    bench.now += 9.0
    rank.say(Progress(step=7))  # said again
    rank.say(a_step(7))
    await until(lambda: bench.bodies(StepDone) != [])

    hello = bench.worker.hello()

    assert (hello.stepped_seconds, hello.step_seconds) == (9.0, 2.0)
    await bench.form(4)
    assert bench.worker.hello().stepped_seconds is None


async def test_only_the_first_step_of_a_generation_is_urgent(bench: Bench) -> None:
    await bench.form(1)
    rank = await bench.rank()
    await until(lambda: len(bench.bodies(Started)) == 1)
    bench.line.urgent.clear()

    for step in (4, 5, 6):
        rank.say(a_step(step))
    rank.say(Held(command_id="c", step=6, checkpoint="k"))

    await until(lambda: len(bench.bodies(Held)) == 1)
    assert bench.line.urgent == [True, False, False, True]


async def test_a_generation_told_twice_starts_once(bench: Bench) -> None:
    await bench.form(3)
    kills = bench.launcher.kills

    await bench.form(3)
    await bench.form(2)

    assert bench.launcher.kills == kills
    assert bench.mailbox.is_current(3)


async def test_a_new_generation_kills_the_old_ranks(bench: Bench) -> None:
    await bench.form(1)
    kills = bench.launcher.kills

    await bench.form(2)

    assert bench.launcher.kills > kills


async def test_a_generation_without_this_agent_ends_what_runs_here(bench: Bench) -> None:
    await bench.form(1)

    await bench.worker.receive(Formed(generation=a_generation(2, (PEER,))))

    assert not bench.mailbox.is_current(1)
    assert bench.worker.hello().generation is None
    assert bench.worker.hello().highest_number == 2


async def test_only_the_running_generation_is_dissolved(bench: Bench) -> None:
    await bench.form(2)

    await bench.worker.receive(Dissolved(number=1, reason="WorkerLost"))
    assert bench.mailbox.is_current(2)
    await bench.worker.receive(Dissolved(number=2, reason="WorkerLost"))
    assert not bench.mailbox.is_current(2)


async def test_the_store_is_hosted_and_its_number_counts_as_seen(bench: Bench) -> None:
    await bench.worker.receive(HostStore(number=9))

    await until(lambda: bench.line.sent == [StoreReady(number=9, port=1009)])
    assert bench.worker.hello().highest_number == 9


async def test_a_store_that_cannot_listen_is_not_fatal(bench: Bench) -> None:
    await bench.worker.receive(HostStore(number=13))
    await bench.worker.receive(HostStore(number=14))

    await until(lambda: bench.line.sent == [StoreReady(number=14, port=1014)])


async def test_each_rank_is_reported_started_once(bench: Bench) -> None:
    await bench.form(1)
    await bench.rank(0)

    bench.worker.ranks_started(1, {0: 50, 1: 51})

    assert [(body.rank, body.pid) for body in bench.bodies(Started)] == [(0, 50), (1, 51)]


async def test_steps_are_reported_and_progress_only_counts(bench: Bench) -> None:
    await bench.form(1)
    rank = await bench.rank(0)

    rank.say(a_step(6))
    rank.say(Progress(step=7))
    await until(lambda: bench.worker.heartbeat().step == 7)

    assert bench.bodies(StepDone) == [a_step(6)]
    assert bench.bodies(Progress) == []
    assert bench.worker.heartbeat().generation == 1


async def test_nonsense_from_a_rank_harms_nobody(bench: Bench) -> None:
    await bench.form(1)
    rank = await bench.rank(0)

    rank.writer.write(b'nonsense\n{"kind":"unheard of"}\n{"kind":"dropped","count":3}\n')
    rank.say(a_step(1))

    await until(lambda: bench.bodies(StepDone) == [a_step(1)])


async def test_a_rank_that_dies_without_a_word_is_reported_with_its_last_lines(bench: Bench, tmp_path: Path) -> None:
    await bench.form(1)
    log = tmp_path / "logs" / "g000001" / "rank1.err"
    log.parent.mkdir(parents=True)
    log.write_text("\n".join(f"line {i}" for i in range(100)))

    bench.worker.ranks_ended(1, {1: -9})

    await until(lambda: bool(bench.bodies(Failed)))
    (failed,) = bench.bodies(Failed)
    assert (failed.rank, failed.exit_code, failed.reason) == (1, -9, "Killed")
    assert failed.message.splitlines() == [
        "rank 1: killed by signal 9 (Killed)",
        *(f"line {i}" for i in range(80, 100)),
    ]
    assert bench.worker.hello().generation is None


async def test_a_rank_that_explained_itself_is_not_reported_again(bench: Bench) -> None:
    await bench.form(1)
    rank = await bench.rank(0)

    rank.say(Failed(rank=0, reason="CollectiveError"))
    rank.writer.close()
    bench.worker.ranks_ended(1, {0: 75})  # Seen before its last words were read.

    await until(lambda: bench.worker.hello().generation is None)
    assert [body.reason for body in bench.bodies(Failed)] == ["CollectiveError"]


async def test_the_last_report_of_a_rank_that_left_a_command_unread_is_taken(bench: Bench) -> None:
    await bench.form(1)
    path = bench.mailbox.take().socket_path
    with socket.socket(socket.AF_UNIX) as rank:
        rank.connect(path)
        rank.sendall(Started(rank=0, local_rank=0, pid=1).to_json().encode() + b"\n")
        await until(lambda: bool(bench.bodies(Started)))
        await bench.worker.receive(Command(id="unread", generation=1))
        await asyncio.sleep(0)
        rank.sendall(b"".join(a_step(step).to_json().encode() + b"\n" for step in range(50)))
        rank.sendall(Finished(step=50, tokens=1, checkpoint="c").to_json().encode() + b"\n")

    await until(lambda: bool(bench.bodies(Finished)), timeout=20)
    assert len(bench.bodies(StepDone)) == 50


async def test_the_end_of_an_old_generations_ranks_is_not_news(bench: Bench) -> None:
    await bench.form(1)
    await bench.form(2)

    bench.worker.ranks_ended(1, {0: -9})
    bench.worker.launch_failed(1, "x")
    bench.worker.ranks_started(1, {0: 1})

    assert bench.reports.is_empty
    assert bench.mailbox.is_current(2)


async def test_ranks_that_cannot_start_are_reported(bench: Bench) -> None:
    await bench.form(1)

    bench.worker.launch_failed(1, "OSError: no more processes")

    (failed,) = bench.bodies(Failed)
    assert (failed.reason, failed.message) == ("LaunchFailed", "OSError: no more processes")


async def test_a_command_waits_for_ranks_that_are_still_starting(bench: Bench) -> None:
    await bench.form(1)
    command = Command(id="c", generation=1, hold_seconds=3)

    await bench.worker.receive(command)
    rank = await bench.rank(0)

    assert Command.model_validate(await rank.hear()) == command


async def test_sigterm_without_ranks_says_goodbye_at_once(bench: Bench) -> None:
    await bench.worker.terminate()

    assert bench.line.sent == [Leaving(), Leaving(final=True)]
    assert bench.worker.exit_code.result() == 143
    assert bench.worker.hello().leaving


async def test_sigterm_waits_until_a_rank_holds(bench: Bench) -> None:
    await bench.form(1)
    rank = await bench.rank(0)
    leaving = asyncio.create_task(bench.worker.terminate())
    command = Command.model_validate(await rank.hear())
    assert bench.line.sent == [Leaving()]
    assert not leaving.done()

    rank.say(Held(command_id=command.id, step=3, checkpoint="c"))
    await leaving

    assert bench.line.sent == [Leaving(), Leaving(final=True)]
    assert bench.bodies(Held)


async def test_ranks_that_went_on_after_an_earlier_hold_take_another_checkpoint(bench: Bench) -> None:
    await bench.form(1)
    rank = await bench.rank(0)
    rank.say(Held(command_id="earlier", step=3, checkpoint="c"))
    rank.say(Resumed(command_id="earlier", step=3))
    await until(lambda: bool(bench.bodies(Resumed)))

    leaving = asyncio.create_task(bench.worker.terminate())
    await rank.hear()
    assert not leaving.done()

    rank.say(Held(command_id="x", step=4, checkpoint="d"))
    await leaving


async def test_ranks_that_never_answer_have_the_grace_less_the_goodbye(bench: Bench) -> None:
    await bench.form(1)
    rank = await bench.rank(0)

    await bench.worker.terminate()  # A grace of 2.2 s, of which 2 are for the goodbye.

    assert await rank.hear()
    assert bench.worker.exit_code.result() == 143


async def test_a_generation_that_comes_while_leaving_is_not_joined(bench: Bench) -> None:
    await bench.form(1)
    rank = await bench.rank(0)
    leaving = asyncio.create_task(bench.worker.terminate())
    await rank.hear()

    await bench.form(2)
    await leaving

    assert not bench.mailbox.is_current(2)


async def test_a_finished_worker_stays_while_the_coordinator_has_not_heard_everything(bench: Bench) -> None:
    await bench.form(1)
    rank = await bench.rank(0)
    rank.say(Finished(step=9, tokens=9, checkpoint="c"))
    rank.writer.close()
    bench.worker.ranks_ended(1, {0: 0, 1: 0})
    await until(lambda: bench.worker.hello().generation is None)

    await asyncio.sleep(2.3)  # The grace.
    assert not bench.worker.exit_code.done()
    bench.reports.acknowledge(bench.reports.last_seq)

    assert await asyncio.wait_for(bench.worker.exit_code, 20) == 0


async def test_shutdown_exits_with_0_and_no_generation_follows(bench: Bench) -> None:
    await bench.form(1)

    await bench.worker.receive(Shutdown(reason="superseded"))

    assert bench.worker.exit_code.result() == 0
    assert bench.mailbox.closed
    assert not bench.mailbox.is_current(1)
