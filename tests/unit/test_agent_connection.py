"""The WebSocket, over a real loopback socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from builders_agent import JOB_UID, ScriptedCoordinator, a_step, until

from pretrain_agent.connection import Connection
from pretrain_agent.outbox import Outbox
from pretrain_api.protocol import CoordinatorMessage, Dissolved, Heartbeat, Hello, Joined, Leaving
from pretrain_api.reports import Saved


class Bench:
    def __init__(self, coordinator: ScriptedCoordinator) -> None:
        self.coordinator = coordinator
        self.outbox = Outbox()
        self.received: list[CoordinatorMessage] = []
        self.connection = Connection(
            url=coordinator.url,
            token_file=None,
            outbox=self.outbox,
            hello=lambda: Hello(job_uid=JOB_UID, slot=0, attempt=0, agent_id="a", host="h"),
            heartbeat=lambda: Heartbeat(generation=1, step=77),
            receive=self._receive,
            random=lambda: 0.5,
        )

    async def _receive(self, message: CoordinatorMessage) -> None:
        self.received.append(message)

    def report(self, step: int) -> None:
        self.outbox.add(1, 0.0, a_step(step))
        self.connection.report_added()

    def heard(self) -> list[int]:
        session = self.coordinator.sessions.get(0)
        return sorted(session.reports) if session else []


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    coordinator = ScriptedCoordinator()
    await coordinator.start()
    made = Bench(coordinator)
    running = asyncio.create_task(made.connection.run())
    yield made
    running.cancel()
    await coordinator.stop()


async def test_reports_go_out_and_acknowledged_ones_are_forgotten(bench: Bench) -> None:
    for step in range(50):
        bench.report(step)

    await until(lambda: bench.heard() == list(range(1, 51)))
    await until(lambda: bench.outbox.is_empty)


async def test_reports_made_in_an_outage_arrive_after_it_once_and_in_order(bench: Bench) -> None:
    bench.report(1)
    await until(lambda: bench.outbox.is_empty)

    await bench.coordinator.stop()
    for step in range(2, 40):
        bench.report(step)
    await bench.coordinator.start()

    await until(lambda: bench.outbox.is_empty)
    assert bench.heard() == list(range(1, 40))
    assert bench.coordinator.sessions[0].replayed == 0


async def test_what_was_sent_but_not_acknowledged_is_sent_again(bench: Bench) -> None:
    bench.coordinator.acknowledges = False
    for step in range(10):
        bench.report(step)
    await until(lambda: len(bench.heard()) == 10)

    await bench.coordinator.stop()
    await bench.coordinator.start()

    await until(lambda: bench.coordinator.sessions[0].replayed == 10)


async def test_an_idle_agent_sends_heartbeats_with_its_step(bench: Bench) -> None:
    await until(lambda: bool(bench.coordinator.sessions))
    session = bench.coordinator.sessions[0]

    await until(lambda: Heartbeat(generation=1, step=77) in session.messages(Heartbeat))


async def test_a_message_follows_the_reports_made_before_it(bench: Bench) -> None:
    await asyncio.wait_for(bench.connection.joined.wait(), 20)
    bench.outbox.add(1, 0.0, Saved(step=1, checkpoint="c", bytes=1, stall_seconds=0, seconds=0))
    bench.connection.report_added()
    bench.connection.send(Leaving(final=True))
    await bench.connection.flush(20)

    session = bench.coordinator.sessions[0]
    await until(lambda: len(session.received) >= 2)
    assert [message.kind for _, message in session.received if message.kind != "heartbeat"] == ["report", "leaving"]


async def test_without_a_connection_a_message_is_lost_and_flushing_waits_for_nothing(bench: Bench) -> None:
    await asyncio.wait_for(bench.connection.joined.wait(), 20)
    await bench.coordinator.stop()
    await until(lambda: not bench.connection.joined.is_set())

    bench.connection.send(Leaving())
    await bench.connection.flush(1000)
    await bench.coordinator.start()
    await until(lambda: len(bench.coordinator.hellos) >= 2)

    await asyncio.wait_for(bench.connection.joined.wait(), 20)
    assert bench.coordinator.sessions[0].messages(Leaving) == []


async def test_messages_of_an_older_coordinator_are_ignored(bench: Bench) -> None:
    bench.coordinator.epoch = 5
    await asyncio.wait_for(bench.connection.joined.wait(), 20)
    session = bench.coordinator.sessions[0]
    await session.send(Dissolved(epoch=5, number=1, reason="x"))
    await session.send(Dissolved(epoch=4, number=2, reason="x"))
    await session.websocket.send_str('{"kind": "of a newer coordinator"}')
    await session.send(Dissolved(epoch=6, number=3, reason="x"))

    await until(lambda: len([m for m in bench.received if isinstance(m, Dissolved)]) == 2)
    assert [m.number for m in bench.received if isinstance(m, Dissolved)] == [1, 3]
    assert bench.connection.highest_epoch == 6


async def test_an_older_coordinator_is_left_for_the_newer_one(bench: Bench) -> None:
    bench.coordinator.epoch = 5
    await asyncio.wait_for(bench.connection.joined.wait(), 20)
    await bench.coordinator.sessions[0].send(Joined(epoch=5))

    await bench.coordinator.stop()
    await until(lambda: not bench.connection.joined.is_set())
    bench.coordinator.epoch = 4
    await bench.coordinator.start()
    await until(lambda: len(bench.coordinator.hellos) >= 4)  # It comes, hears the old epoch, goes and comes again.
    assert not bench.connection.joined.is_set()
    bench.coordinator.epoch = 6

    await asyncio.wait_for(bench.connection.joined.wait(), 20)


async def test_the_token_is_read_anew_for_each_connection(tmp_path: Path) -> None:
    coordinator = ScriptedCoordinator()
    await coordinator.start()
    token = tmp_path / "token"
    token.write_text("one\n")
    made = Bench(coordinator)
    made.connection._token_file = token
    running = asyncio.create_task(made.connection.run())
    try:
        await until(lambda: bool(coordinator.headers))
        token.write_text("two\n")
        await coordinator.stop()
        await coordinator.start()
        await until(lambda: len(coordinator.headers) == 2)
    finally:
        running.cancel()
        await coordinator.stop()

    assert coordinator.headers == ["Bearer one", "Bearer two"]


@pytest.fixture(autouse=True)
def _quick_reconnects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain_agent.connection.LONGEST_WAIT", 0.05)
