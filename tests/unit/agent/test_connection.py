"""The WebSocket, over a real loopback socket."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from pretrain_agent.worker.connection import CONNECT_SECONDS, UNANSWERED, CoordinatorConnection
from pretrain_agent.worker.report_buffer import ReportBuffer
from pretrain_api.backoff import Backoff
from pretrain_api.messages.protocol import CoordinatorMessage, Dissolved, Heartbeat, Hello, Joined, Leaving
from pretrain_api.messages.reports import Saved
from support.kubernetes.tls import Authority
from support.worker.agent import JOB_UID, ScriptedCoordinator, a_step, until


class Bench:
    def __init__(self, coordinator: ScriptedCoordinator, ca_file: Path | None = None) -> None:
        self.coordinator = coordinator
        self.reports = ReportBuffer()
        self.received: list[CoordinatorMessage] = []
        self.connection = CoordinatorConnection(
            url=coordinator.url,
            token_file=None,
            ca_file=ca_file,
            reports=self.reports,
            hello=lambda: Hello(job_uid=JOB_UID, slot=0, attempt=0, agent_id="a", host="h"),
            heartbeat=lambda: Heartbeat(generation=1, step=77),
            receive=self._receive,
            random=lambda: 0.5,
        )

    async def _receive(self, message: CoordinatorMessage) -> None:
        self.received.append(message)

    def report(self, step: int, *, urgent: bool = True) -> None:
        self.reports.add(1, 0.0, a_step(step))
        self.connection.report_added(urgent=urgent)

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
    await until(lambda: bench.reports.is_empty)


async def test_reports_made_in_an_outage_arrive_after_it_once_and_in_order(bench: Bench) -> None:
    bench.report(1)
    await until(lambda: bench.reports.is_empty)

    await bench.coordinator.stop()
    for step in range(2, 40):
        bench.report(step)
    await bench.coordinator.start()

    await until(lambda: bench.reports.is_empty)
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


async def test_what_is_not_urgent_goes_out_in_place_of_a_heartbeat(bench: Bench) -> None:
    await asyncio.wait_for(bench.connection.joined.wait(), 20)
    for step in range(3):
        bench.report(step, urgent=False)

    await until(lambda: bench.reports.is_empty)
    kinds = [message.kind for _, message in bench.coordinator.sessions[0].received if message.kind != "hello"]
    assert "report" * 3 in "".join(kinds), "no heartbeat stands between them"


async def test_what_is_urgent_takes_along_what_waits(bench: Bench) -> None:
    await asyncio.wait_for(bench.connection.joined.wait(), 20)
    bench.report(1, urgent=False)
    bench.report(2)
    bench.connection.send(Leaving(final=True))

    session = bench.coordinator.sessions[0]
    await until(lambda: bool(session.messages(Leaving)))
    kinds = [message.kind for _, message in session.received if message.kind != "heartbeat"]
    assert kinds == ["report", "report", "leaving"]


async def test_heartbeats_go_on_after_everything_was_forgotten(bench: Bench) -> None:
    bench.report(1)
    await until(lambda: bench.reports.is_empty)
    await bench.coordinator.stop()
    await bench.coordinator.start()  # It has no memory: nothing is acknowledged, and nothing is left to be sent.

    await until(lambda: bool(bench.coordinator.sessions) and bool(bench.coordinator.sessions[0].messages(Heartbeat)))


async def test_an_idle_agent_sends_heartbeats_with_its_step(bench: Bench) -> None:
    await until(lambda: bool(bench.coordinator.sessions))
    session = bench.coordinator.sessions[0]

    await until(lambda: Heartbeat(generation=1, step=77) in session.messages(Heartbeat))


async def test_a_message_follows_the_reports_made_before_it(bench: Bench) -> None:
    await asyncio.wait_for(bench.connection.joined.wait(), 20)
    bench.reports.add(1, 0.0, Saved(step=1, checkpoint="c", bytes=1, stall_seconds=0, seconds=0))
    bench.connection.report_added(urgent=True)
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


# --- TLS --------------------------------------------------------------------------------------------------------------


class Secured:
    """A coordinator that speaks TLS, and an agent that trusts one authority."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ca_file = folder, folder / "ca.crt"
        self.authority = Authority()
        self.ca_file.write_text(self.authority.pem)
        self.coordinator = ScriptedCoordinator()

    async def start(self, authority: Authority | None = None, name: str = "127.0.0.1") -> None:
        self.coordinator.tls = (authority or self.authority).server(self.folder, name)
        await self.coordinator.start()
        if not hasattr(self, "bench"):
            self.bench = Bench(self.coordinator, self.ca_file)
            self.bench.connection._token_file = self.folder / "token"
            (self.folder / "token").write_text("secret")
            self.running = asyncio.create_task(self.bench.connection.run())

    async def joins(self) -> None:
        await asyncio.wait_for(self.bench.connection.joined.wait(), 20)

    async def stop(self) -> None:
        await self.coordinator.stop()
        await until(lambda: not self.bench.connection.joined.is_set())


@pytest_asyncio.fixture
async def secured(tmp_path: Path) -> AsyncIterator[Secured]:
    made = Secured(tmp_path)
    yield made
    made.running.cancel()
    await made.coordinator.stop()


async def test_a_coordinator_with_a_certificate_of_the_given_authority_is_joined(secured: Secured) -> None:
    await secured.start()

    await secured.joins()
    assert secured.coordinator.headers == ["Bearer secret"]


@pytest.mark.parametrize(
    ("authority", "name", "complaint"),
    [(Authority(), "127.0.0.1", "certificate verify failed"), (None, "another", "IP address mismatch")],
)
async def test_a_coordinator_that_cannot_prove_itself_gets_no_token(
    secured: Secured, authority: Authority | None, name: str, complaint: str
) -> None:
    with capture_logs() as lines:
        await secured.start(authority, name)
        await until(lambda: bool(lines))

    assert re.search(complaint, lines[0]["error"]), lines
    assert secured.coordinator.headers == []
    await secured.stop()
    await secured.start()
    await secured.joins()


async def test_a_new_authority_is_taken_up_at_the_next_connection(secured: Secured) -> None:
    await secured.start()
    await secured.joins()

    newer = Authority("newer")
    secured.ca_file.write_text(newer.pem)
    await secured.stop()
    await secured.start(newer)

    await secured.joins()


@pytest.mark.parametrize("content", [None, "", "no certificate"])
async def test_a_missing_or_broken_authority_is_named_and_waited_for(secured: Secured, content: str | None) -> None:
    secured.ca_file.unlink()
    if content is not None:
        secured.ca_file.write_text(content)
    with capture_logs() as lines:
        await secured.start()
        await until(lambda: bool(lines))
    assert f"--ca-file {secured.ca_file}: " in lines[0]["error"]

    secured.ca_file.write_text(secured.authority.pem)
    await secured.joins()


# --- coordinators that do not want it, or do not answer ---------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 404, 503])
async def test_an_agent_that_is_refused_says_so_once_and_tries_on(bench: Bench, status: int) -> None:
    await asyncio.wait_for(bench.connection.joined.wait(), 20)
    bench.coordinator.refuses = status
    with capture_logs() as lines:
        await bench.coordinator.stop()
        bench.report(1)
        await bench.coordinator.start()
        await until(lambda: bench.coordinator.refused >= 4)
    assert len([line for line in lines if line["log_level"] == "warning" and str(status) in line["error"]]) == 1

    bench.coordinator.refuses = 0
    await until(lambda: bench.reports.is_empty)


async def test_a_missing_token_is_waited_for(tmp_path: Path, bench: Bench) -> None:
    bench.connection._token_file = tmp_path / "token"
    await bench.coordinator.stop()
    with capture_logs() as lines:
        await bench.coordinator.start()
        await until(lambda: any("No such file" in line.get("error", "") for line in lines))

    bench.connection._token_file.write_bytes(b"\xff\n")
    await asyncio.wait_for(bench.connection.joined.wait(), 20)


async def test_a_coordinator_that_accepts_and_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain_agent.worker.connection.CONNECT_SECONDS", 0.2)
    coordinator = ScriptedCoordinator()
    mute = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    coordinator.port = mute.sockets[0].getsockname()[1]
    made = Bench(coordinator)
    with capture_logs() as lines:
        running = asyncio.create_task(made.connection.run())
        await until(lambda: bool(lines))
        mute.close()
        await coordinator.start()
        await asyncio.wait_for(made.connection.joined.wait(), 20)
    running.cancel()
    await coordinator.stop()

    assert lines[0]["error"] == "TimeoutError"


async def test_a_coordinator_that_stops_answering_is_looked_for_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain_agent.worker.connection.PING_SECONDS", 0.05)
    await asyncio.wait_for(bench.connection.joined.wait(), 20)
    stays = bench.coordinator.sessions[0].websocket
    await asyncio.sleep(0.05 * (UNANSWERED + 3))  # it has nothing to say, and answers
    assert bench.coordinator.sessions[0].websocket is stays

    assert stays._req is not None
    assert stays._req.transport is not None
    stays._req.transport.pause_reading()  # as a process that is stopped

    await until(lambda: bench.coordinator.sessions[0].websocket is not stays)


async def test_a_try_that_nobody_answers_is_joined_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain_agent.worker.connection.TRY_SECONDS", 0.05)
    coordinator = ScriptedCoordinator()
    await coordinator.start()
    real, tries = coordinator.port, list[asyncio.StreamWriter]()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """As a Service that leads to a replica that answers no more, until the third try."""
        tries.append(writer)
        if len(tries) < 3:
            return
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", real)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    service = await asyncio.start_server(pass_on, "127.0.0.1", 0)
    coordinator.port = service.sockets[0].getsockname()[1]
    made = Bench(coordinator)
    running = asyncio.create_task(made.connection.run())

    await asyncio.wait_for(made.connection.joined.wait(), CONNECT_SECONDS)

    assert len(tries) >= 3
    running.cancel()
    service.close()
    await coordinator.stop()


async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(4096):
        sink.write(data)


@pytest.fixture(autouse=True)
def _quick_reconnects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain_agent.worker.connection.RECONNECT", Backoff(0.01, 2, 0.05, 1))
