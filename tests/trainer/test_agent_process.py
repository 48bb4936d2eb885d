"""Real agents with real ranks, under a coordinator that does what the test says."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import psutil
import pytest
import pytest_asyncio

from pretrain_api.messages.protocol import Command, Dissolved, Formed, Leaving, Shutdown
from pretrain_api.messages.reports import Failed, Finished, Held, Started, StepDone
from support.worker.agent import PLAIN_PROGRAM, STEPPING_PROGRAM, Field, a_field, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

FOREVER = "1000000"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Field]:
    """Two agents that have joined; each test forms generations of its own."""
    async with a_field(tmp_path_factory.mktemp("pair")) as field:
        field.logs = field.folder / "run"
        program = [field.program(STEPPING_PROGRAM), FOREVER, "0.01"]
        await field.start_all(2, program, "--processes", "2", "--run-dir", str(field.logs))
        yield field


@pytest_asyncio.fixture(loop_scope="module")
async def field(tmp_path: Path) -> AsyncIterator[Field]:
    """A coordinator without agents."""
    async with a_field(tmp_path) as empty:
        yield empty


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    return itertools.count(1)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_two_agents_train_together(pair: Field, numbers: Iterator[int]) -> None:
    number = next(numbers)
    await pair.coordinator.form(number, (0, 1))

    await pair.coordinator.steps(0, number, 5)
    await until(lambda: pair.coordinator.sessions[1].step >= 5)

    assert list(pair.coordinator.pids(0, number)) == [0, 1]
    assert list(pair.coordinator.pids(1, number)) == [2, 3]


async def test_ranks_restart_from_the_warm_fork(pair: Field, numbers: Iterator[int]) -> None:
    coordinator = pair.coordinator
    seconds = []
    for _ in range(5):
        number = next(numbers)
        sent = await coordinator.form(number, (0, 1))
        await coordinator.steps(0, number, 1)
        starts = [
            report.time - sent
            for session in coordinator.sessions.values()
            for report in session.reports.values()
            if report.generation == number and isinstance(report.body, Started)
        ]
        assert len(starts) == 4
        seconds.append(max(starts))

    median = sorted(seconds)[2]
    print(f"\nnew generation -> all ranks started: median {median:.3f} s of {[round(s, 3) for s in seconds]}")
    (parent,) = {psutil.Process(pid).ppid() for pid in pair.coordinator.pids(0, number).values()}
    assert "multiprocessing.forkserver" in " ".join(psutil.Process(parent).cmdline())


async def test_the_old_ranks_are_killed_when_a_new_generation_comes(pair: Field, numbers: Iterator[int]) -> None:
    first, second = next(numbers), next(numbers)
    await pair.coordinator.form(first, (0, 1))
    await pair.coordinator.steps(0, first, 1)
    old = [*pair.coordinator.pids(0, first).values(), *pair.coordinator.pids(1, first).values()]

    await pair.coordinator.form(second, (1, 0))
    await pair.coordinator.steps(1, second, 1)

    assert not any(alive(pid) for pid in old)
    assert list(pair.coordinator.pids(1, second)) == [0, 1]


async def test_an_agent_outside_of_the_generation_has_no_ranks(pair: Field, numbers: Iterator[int]) -> None:
    both, one = next(numbers), next(numbers)
    await pair.coordinator.form(both, (0, 1))
    await pair.coordinator.steps(0, both, 1)
    left_out = list(pair.coordinator.pids(1, both).values())

    await pair.coordinator.form(one, (0,))
    await pair.coordinator.sessions[1].send(Formed(generation=pair.coordinator.generations[one]))
    await pair.coordinator.steps(0, one, 3)

    await until(lambda: not any(alive(pid) for pid in left_out))
    assert pair.coordinator.pids(1, one) == {}


async def test_a_dissolved_generation_stops_and_the_agent_waits(pair: Field, numbers: Iterator[int]) -> None:
    first, second = next(numbers), next(numbers)
    await pair.coordinator.form(first, (0, 1))
    await pair.coordinator.steps(0, first, 1)
    pids = [*pair.coordinator.pids(0, first).values(), *pair.coordinator.pids(1, first).values()]

    await pair.coordinator.to_all(Dissolved(number=first, reason="WorkerLost"))
    await until(lambda: not any(alive(pid) for pid in pids))
    await pair.coordinator.form(second, (0, 1))

    await pair.coordinator.steps(0, second, 1)
    assert not pair.coordinator.sessions[0].bodies(Failed, first)


async def test_a_killed_rank_is_reported_at_once_and_all_start_again(pair: Field, numbers: Iterator[int]) -> None:
    coordinator = pair.coordinator
    first, second = next(numbers), next(numbers)
    await coordinator.form(first, (0, 1))
    await coordinator.steps(0, first, 3)

    killed = time.time()
    os.kill(coordinator.pids(1, first)[3], signal.SIGKILL)
    await until(lambda: bool(coordinator.sessions[1].bodies(Failed, first)))

    (failed,) = coordinator.sessions[1].bodies(Failed, first)
    assert (failed.rank, failed.exit_code, failed.reason) == (3, -9, "Killed")
    await until(lambda: not alive(coordinator.pids(1, first)[2]))  # Its neighbour under the same agent.
    (seen,) = [r.time for r in coordinator.sessions[1].reports.values() if r.body == failed and r.generation == first]
    print(f"\nkill -9 of a rank -> reported: {seen - killed:.3f} s")
    await coordinator.form(second, (0, 1))
    await coordinator.steps(0, second, 3)


async def test_a_rank_that_fails_by_itself_is_reported_with_the_end_of_its_output(
    pair: Field, numbers: Iterator[int]
) -> None:
    coordinator = pair.coordinator
    number = next(numbers)
    await coordinator.form(number, (0, 1))
    await coordinator.steps(0, number, 3)

    for pid in coordinator.pids(1, number).values():
        with contextlib.suppress(ProcessLookupError):  # The agent may kill the second when it sees the first one dead.
            os.kill(pid, signal.SIGKILL)
    await until(lambda: bool(coordinator.sessions[0].bodies(Failed, number)))

    failed = coordinator.sessions[0].bodies(Failed, number)[0]
    assert failed.rank in (0, 1)
    assert (failed.exit_code, failed.reason) == (1, "ExitCode")
    assert "RuntimeError" in failed.message


async def test_ranks_train_through_an_outage_and_reports_are_replayed_once(pair: Field, numbers: Iterator[int]) -> None:
    coordinator = pair.coordinator
    number = next(numbers)
    await coordinator.form(number, (0, 1))
    await coordinator.steps(0, number, 3)
    pids = coordinator.pids(0, number)

    await coordinator.stop()
    before = len(coordinator.sessions[0].bodies(StepDone, number))
    hellos = len(coordinator.hellos)
    log = pair.logs / "logs" / f"g{number:06d}" / "rank0.out"
    steps_at_stop = len(log.read_text().splitlines())
    await until(lambda: len(log.read_text().splitlines()) > steps_at_stop + 30)
    await coordinator.start()
    await until(lambda: len(coordinator.hellos) >= hellos + 2)
    await coordinator.steps(0, number, before + 40)

    session = coordinator.sessions[0]
    assert coordinator.pids(0, number) == pids
    assert all(alive(pid) for pid in pids.values())
    assert [body.step for body in session.bodies(StepDone, number)] == list(
        range(1, 1 + len(session.bodies(StepDone, number)))
    )
    assert sorted(session.reports) == list(range(1, 1 + len(session.reports)))
    assert session.replayed == 0
    hello = coordinator.hellos[-1]
    assert hello.generation == coordinator.generations[number]
    assert hello.highest_number == number


async def test_a_coordinator_that_forgot_everything_hears_what_was_not_acknowledged(
    pair: Field, numbers: Iterator[int]
) -> None:
    coordinator = pair.coordinator
    number = next(numbers)
    await coordinator.form(number, (0, 1))
    await coordinator.steps(0, number, 1)
    coordinator.acknowledges = False
    await coordinator.steps(0, number, len(coordinator.sessions[0].bodies(StepDone, number)) + 10)
    heard = max(coordinator.sessions[0].reports)

    await coordinator.stop()
    await coordinator.start()
    await until(lambda: coordinator.sessions[0].replayed >= 8)

    coordinator.acknowledges = True
    await until(lambda: max(coordinator.sessions[0].reports) > heard + 5)
    reports = coordinator.sessions[0].reports
    assert sorted(reports) == list(range(1, 1 + len(reports)))


async def test_a_command_reaches_the_ranks(pair: Field, numbers: Iterator[int]) -> None:
    coordinator = pair.coordinator
    number = next(numbers)
    await coordinator.form(number, (0, 1))
    await coordinator.steps(0, number, 1)

    await coordinator.to_all(Command(id="hold", generation=number, hold_seconds=5))

    await until(lambda: all(session.bodies(Held, number) for session in coordinator.sessions.values()))
    assert coordinator.sessions[0].bodies(Held, number)[0].command_id == "hold"


async def test_a_command_for_another_generation_is_not_passed_on(pair: Field, numbers: Iterator[int]) -> None:
    coordinator = pair.coordinator
    number = next(numbers)
    await coordinator.form(number, (0, 1))
    await coordinator.steps(0, number, 1)

    await coordinator.to_all(Command(id="late", generation=number - 1, hold_seconds=5))
    await coordinator.steps(0, number, 20)

    assert not coordinator.sessions[0].bodies(Held, number)


async def test_a_coordinator_of_a_lower_epoch_is_not_obeyed(pair: Field, numbers: Iterator[int]) -> None:
    coordinator = pair.coordinator
    number = next(numbers)
    coordinator.epoch += 2
    await coordinator.form(number, (0, 1))
    await coordinator.steps(0, number, 1)

    await coordinator.to_all(Dissolved(epoch=coordinator.epoch - 1, number=number, reason="Stale"))
    await coordinator.steps(0, number, 20)

    assert all(alive(pid) for pid in coordinator.pids(0, number).values())


async def test_metrics_and_health_are_served(pair: Field, numbers: Iterator[int]) -> None:
    number = next(numbers)
    await pair.coordinator.form(number, (0, 1), reason="Resized")
    await pair.coordinator.steps(0, number, 2)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{pair.agents[0].http_port()}") as http:
        async with http.get("/healthz") as answer:
            assert answer.status == 200
        async with http.get("/metrics") as answer:
            metrics = await answer.text()

    assert f"pretrain_worker_generation {float(number)}" in metrics
    assert "pretrain_worker_connected 1.0" in metrics
    assert 'pretrain_worker_restarts_total{reason="Resized"}' in metrics
    assert "pretrain_worker_step_seconds_count" in metrics


async def test_a_killed_agent_leaves_no_process_behind(field: Field) -> None:
    (agent,) = await field.start_all(1, [field.program(STEPPING_PROGRAM), FOREVER, "0.01"], "--processes", "2")
    await field.coordinator.form(1, (0,))
    await field.coordinator.steps(0, 1, 3)
    family = agent.family()
    assert len(family) >= 5  # The agent, its fork server, its resource tracker, two ranks.

    os.kill(agent.pid, signal.SIGKILL)
    agent.process.wait()

    died = time.monotonic()
    await until(lambda: not agent.family(), timeout=20)
    print(f"\nkill -9 of an agent -> nothing left: {time.monotonic() - died:.3f} s")


async def test_sigterm_takes_a_checkpoint_says_goodbye_and_exits(field: Field) -> None:
    agents = await field.start_all(2, [field.program(STEPPING_PROGRAM), FOREVER, "0.01"])
    coordinator = field.coordinator
    await coordinator.form(1, (0, 1))
    await coordinator.steps(0, 1, 3)

    os.kill(agents[1].pid, signal.SIGTERM)
    code = await agents[1].exit_code()

    session = coordinator.sessions[1]
    assert code == 143
    assert [message.final for message in session.messages(Leaving)] == [False, True]
    assert len(session.bodies(Held)) == 1
    kinds = [message.body.kind if message.kind == "report" else message.kind for _, message in session.received]
    assert kinds.index("held") < len(kinds) - 1 - kinds[::-1].index("leaving"), "the goodbye came before the checkpoint"
    await until(lambda: bool(coordinator.sessions[0].bodies(Held)))
    await until(lambda: not agents[1].family())


async def test_a_second_sigterm_ends_the_agent_at_once(field: Field) -> None:
    program = STEPPING_PROGRAM.replace("if asked[1]:", "if False:")  # Never answers a command.
    (agent,) = await field.start_all(1, [field.program(program), FOREVER, "0.01"], "--grace", "1000")
    await field.coordinator.form(1, (0,))
    await field.coordinator.steps(0, 1, 3)

    os.kill(agent.pid, signal.SIGTERM)
    await until(lambda: bool(field.coordinator.sessions[0].messages(Leaving)))
    assert agent.process.poll() is None
    os.kill(agent.pid, signal.SIGTERM)

    assert await agent.exit_code() == 143
    await until(lambda: not agent.family())


async def test_a_superseded_agent_kills_its_ranks_and_exits_with_0(field: Field) -> None:
    (agent,) = await field.start_all(1, [field.program(STEPPING_PROGRAM), FOREVER, "0.01"])
    await field.coordinator.form(1, (0,))
    await field.coordinator.steps(0, 1, 3)

    await field.coordinator.to_all(Shutdown(reason="superseded"))

    assert await agent.exit_code() == 0
    await until(lambda: not agent.family())


async def test_a_finished_worker_stays_until_it_is_told_to_go(field: Field) -> None:
    (agent,) = await field.start_all(1, [field.program(STEPPING_PROGRAM), "10", "0"])
    await field.coordinator.form(1, (0,))
    session = field.coordinator.sessions[0]
    await until(lambda: bool(session.bodies(Finished)))
    (rank,) = field.coordinator.pids(0, 1).values()
    await until(lambda: not alive(rank))
    assert not session.bodies(Failed)
    assert agent.process.poll() is None

    await field.coordinator.form(2, (0,))  # Another worker failed in its last moment: all run once more.
    await until(lambda: len(session.bodies(Finished)) == 2)
    await field.coordinator.to_all(Shutdown(reason="succeeded"))

    assert await agent.exit_code() == 0


async def test_a_finished_worker_goes_after_the_grace_when_nobody_tells_it_to(field: Field) -> None:
    (agent,) = await field.start_all(1, [field.program(STEPPING_PROGRAM), "3", "0"], "--grace", "0.1")
    await field.coordinator.form(1, (0,))

    assert await agent.exit_code() == 0
    assert field.coordinator.sessions[0].bodies(Finished)


async def test_a_script_that_knows_nothing_of_the_agent_runs_and_fails_and_runs_again(field: Field) -> None:
    out, token = field.folder / "out", field.folder / "token"
    token.write_text("secret\n")
    program = [field.program(PLAIN_PROGRAM), str(out), "20"]
    (agent,) = await field.start_all(1, program, "--processes", "2", "--token-file", str(token))
    session = field.coordinator.sessions[0]
    assert field.coordinator.headers == ["Bearer secret"]

    await field.coordinator.form(1, (0,))
    await until(lambda: bool(session.bodies(Failed)))
    (failed,) = session.bodies(Failed)
    assert (failed.rank, failed.exit_code) == (0, 1)
    assert "ValueError: the first time is bad" in failed.message
    assert "ValueError: the first time is bad" in agent.log.read_text()

    await field.coordinator.form(2, (0,))
    await until(lambda: all(Path(f"{out}.{rank}").exists() for rank in (0, 1)))
    await until(lambda: len(field.coordinator.pids(0, 2)) == 2)
    await until(lambda: not any(alive(pid) for pid in field.coordinator.pids(0, 2).values()))
    assert Path(f"{out}.0").read_text() == "2 of 2"
    assert not session.bodies(Failed, 2)
