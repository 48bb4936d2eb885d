import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain_api.messages.protocol import Command
from pretrain_api.messages.reports import Saved
from pretrain_sdk import rank_link as client
from pretrain_sdk.rank_link import SOCKET_VARIABLE, SocketLink, connect
from support.worker.agent import a_generation, a_step

A_COMMAND = Command(id="c1", generation=1, hold_seconds=5)


class FakeAgent:
    """The other end of the socket: reads only when told to."""

    def __init__(self, path: Path) -> None:
        self.environ = {SOCKET_VARIABLE: str(path)}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.connection = self._listener
        self.greeting = b""

    def accept(self) -> None:
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(20)
        while not self.greeting.endswith(b"\n"):
            self.greeting += self.connection.recv(4096)
        self.say(a_generation().to_json())

    def say(self, line: str) -> None:
        self.connection.sendall(line.encode() + b"\n")

    def read_all(self) -> list[dict]:
        data = b""
        while chunk := self.connection.recv(65536):
            data += chunk
        return [json.loads(line) for line in data.splitlines()]

    def close(self) -> None:
        self.connection.close()
        self._listener.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    fake = FakeAgent(tmp_path / "socket")
    yield fake
    fake.close()


def linked(agent: FakeAgent) -> SocketLink:
    thread = threading.Thread(target=agent.accept)
    thread.start()
    link = connect(3, 1, agent.environ)
    thread.join()
    assert isinstance(link, SocketLink)
    return link


def test_the_first_line_says_who_started_and_the_answer_is_the_generation(agent: FakeAgent) -> None:
    link = linked(agent)

    started = json.loads(agent.greeting)
    assert (started["kind"], started["rank"], started["localRank"]) == ("started", 3, 1)
    assert link.generation == a_generation()


def test_without_an_agent_the_link_does_nothing() -> None:
    link = connect(0, 0, {})

    link.report(a_step(1))
    assert link.generation is None
    assert link.commands() == ()
    assert link.wait_command(0.0) == ()
    link.close()


def test_an_agent_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="generation is over"):
        connect(0, 0, {SOCKET_VARIABLE: str(tmp_path / "nothing")})


def test_reports_arrive_in_order(agent: FakeAgent) -> None:
    link = linked(agent)
    for step in range(100):
        link.report(a_step(step))
    link.close()

    assert [line["step"] for line in agent.read_all()] == list(range(100))


def test_commands_come_without_waiting(agent: FakeAgent) -> None:
    link = linked(agent)
    assert link.commands() == ()

    agent.say('{"kind": "of a newer agent"}')
    agent.say(A_COMMAND.to_json())

    assert link.wait_command(20) == (A_COMMAND,)
    assert link.commands() == ()


def test_half_a_command_is_kept_for_its_other_half(agent: FakeAgent) -> None:
    link = linked(agent)
    line = A_COMMAND.to_json().encode() + b"\n"
    agent.connection.sendall(line[:20])
    assert link.commands() == ()
    agent.connection.sendall(line[20:])

    assert link.wait_command(20) == (A_COMMAND,)


def test_waiting_for_a_command_that_does_not_come_ends(agent: FakeAgent) -> None:
    assert linked(agent).wait_command(0.01) == ()


def test_an_agent_that_never_reads_does_not_block_a_rank(agent: FakeAgent) -> None:
    link = linked(agent)
    rare = Saved(step=0, checkpoint="rare", bytes=1, stall_seconds=0, seconds=0)
    link.report(rare)
    done = threading.Event()

    def report_much() -> None:
        for step in range(20_000):
            link.report(a_step(step))
            if step == 10_000:
                link.report(rare)
        done.set()

    threading.Thread(target=report_much, daemon=True).start()
    assert done.wait(60), "a report blocked"

    assert link.dropped > 10_000
    reader = threading.Thread(target=link.close)
    reader.start()
    lines = agent.read_all()
    reader.join()
    assert [line["checkpoint"] for line in lines if line["kind"] == "saved"] == ["rare", "rare"]
    assert [line for line in lines if line["kind"] == "step"][-1]["step"] == 19_999
    assert sum(line["count"] for line in lines if line["kind"] == "dropped") == link.dropped


def test_closing_does_not_wait_for_ever_for_an_agent_that_never_reads(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "CLOSE_SECONDS", 0.05)
    link = linked(agent)
    for step in range(5000):
        link.report(a_step(step))

    link.close()


def test_an_agent_that_is_gone_is_no_error(agent: FakeAgent) -> None:
    link = linked(agent)
    agent.close()

    for step in range(10):
        link.report(a_step(step))
    before = time.monotonic()
    assert link.wait_command(0.05) == ()
    assert time.monotonic() - before >= 0.05
    link.close()
