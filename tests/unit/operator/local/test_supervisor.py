"""The supervisor with real processes: a fake operator over the real control channel, workers that sleep."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from pretrain_api.status.records import EvaluationRecord, SampleRecord
from pretrain_cli.render.report import read_lines
from pretrain_operator.local.run_folder import FolderInUse, RunFolder, UnreadableStatus
from pretrain_operator.local.supervisor import OperatorCrashed, Supervisor
from support.operator.supervisor import FAKE_OPERATOR, Watching, a_supervisor, alive, kill_worker


@asynccontextmanager
async def running(tmp_path: Path, replicas: int = 2) -> AsyncIterator[tuple[Supervisor, Watching]]:
    watching = Watching()
    with RunFolder(tmp_path / "run") as folder:
        supervisor = a_supervisor(folder, watching, replicas)
        task = asyncio.create_task(supervisor.run())
        try:
            await watching.until(lambda: live_slots(supervisor) == set(range(replicas)))
            yield supervisor, watching
        finally:
            supervisor.stop()
            await task


def live_slots(supervisor: Supervisor) -> set[int]:
    return {pod.slot for pod in supervisor.pods if pod.alive}


def pods_of(supervisor: Supervisor, slot: int) -> list[int]:
    return [pod.attempt for pod in supervisor.pods if pod.slot == slot and pod.alive]


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def start(script: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)


async def settled(condition: Callable[[], bool]) -> None:
    """Wait for what only the operating system does."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_killed_worker_is_gone_with_its_ranks_and_is_replaced(tmp_path: Path) -> None:
    async with running(tmp_path) as (supervisor, watching):
        await settled(lambda: len(supervisor.processes(1)) == 2)
        agent, rank = supervisor.processes(1)

        kill_worker(supervisor, 1)
        await watching.until(lambda: {process.pid for process in supervisor.processes(1)[:1]} - {agent.pid} != set())

        assert not alive([agent, rank])
        assert [fault.slot for fault in supervisor.faults] == [1]


async def test_a_failed_worker_says_why(tmp_path: Path) -> None:
    watching = Watching()
    with RunFolder(tmp_path) as folder:
        supervisor = a_supervisor(folder, watching, 1, script="import sys; sys.exit('no such file')")
        await supervisor._pods.create(0, 0)
        await settled(lambda: not supervisor.pods[0].alive)

        assert (supervisor.pods[0].exit_code, supervisor.pods[0].message) == (1, "exit code 1: no such file")
        await supervisor._end_all()


async def test_workers_outlive_the_operator_process_and_the_next_one_has_a_higher_epoch(tmp_path: Path) -> None:
    async with running(tmp_path) as (supervisor, watching):
        before = [pod.slot for pod in supervisor.pods], [supervisor.processes(slot)[0].pid for slot in (0, 1)]

        assert supervisor.kill_operator("kill:coordinator,step=1")
        await watching.until(lambda: watching.epochs == ["1", "2"])
        await watching.until(lambda: supervisor.status.generation == 2)

        assert ([pod.slot for pod in supervisor.pods], [supervisor.processes(s)[0].pid for s in (0, 1)]) == before


async def test_an_operator_process_gets_the_last_written_status(tmp_path: Path) -> None:
    async with running(tmp_path) as (supervisor, watching):
        first = supervisor.status

        supervisor.kill_operator("kill:coordinator,step=1")
        await watching.until(lambda: supervisor.status.generation == 2)

        assert supervisor.status == first.model_copy(update={"generation": 2, "replicas": supervisor.status.replicas})
        assert RunFolder(tmp_path / "run").read_status().job_uid == "uid"


async def test_an_operator_process_that_always_ends_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIE", "1")
    watching = Watching()
    with RunFolder(tmp_path) as folder:
        supervisor = a_supervisor(folder, watching)

        with pytest.raises(OperatorCrashed, match=r"3 times in a row: .* \(see .*operator\.log\)"):
            await supervisor.run()

    assert watching.epochs == ["1", "2", "3"]
    assert descendants() == []


async def test_scaling_starts_another_worker(tmp_path: Path) -> None:
    async with running(tmp_path, 1) as (supervisor, watching):
        supervisor.scale(2, "add:worker,step=1")

        await watching.until(lambda: live_slots(supervisor) == {0, 1})


async def test_stopping_lets_all_workers_go_and_leaves_no_process(tmp_path: Path) -> None:
    async with running(tmp_path):
        pass

    assert descendants() == []


async def test_a_worker_that_ignores_the_grace_is_killed_with_its_ranks(tmp_path: Path) -> None:
    async with running(tmp_path, 1) as (supervisor, _):
        await settled(lambda: len(supervisor.processes(0)) == 2)
        there = list(supervisor.processes(0))
        there[0].send_signal(signal.SIGSTOP)

        supervisor._pods.delete(0, supervisor.pods[0].attempt, 0.05)

        await settled(lambda: not alive(there))


async def test_a_cancelled_run_kills_everything(tmp_path: Path) -> None:
    watching = Watching()
    with RunFolder(tmp_path) as folder:
        supervisor = a_supervisor(folder, watching)
        task = asyncio.create_task(supervisor.run())
        await watching.until(lambda: live_slots(supervisor) == {0, 1})

        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert descendants() == []


async def test_a_killed_supervisor_takes_all_its_processes_with_it(tmp_path: Path) -> None:
    script = f"""
import asyncio, sys
from pathlib import Path
from support.operator.supervisor import Watching, a_supervisor
from pretrain_operator.local.run_folder import RunFolder
async def main():
    watching = Watching()
    with RunFolder(Path({str(tmp_path)!r})) as folder:
        supervisor = a_supervisor(folder, watching)
        task = asyncio.create_task(supervisor.run())
        await watching.until(lambda: len(supervisor.pods) == 2)
        print("up", flush=True)
        await task
asyncio.run(main())
"""
    environment = {**os.environ, "PYTHONPATH": str(FAKE_OPERATOR.parents[2])}
    process = start(script, environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    there = psutil.Process(process.pid)
    await settled(lambda: len(there.children(recursive=True)) == 5)
    below = there.children(recursive=True)

    process.kill()
    process.wait()
    process.stdout.close()

    await settled(lambda: not alive(below))


async def test_what_is_said_twice_is_written_once(tmp_path: Path) -> None:
    async with running(tmp_path) as (supervisor, watching):
        supervisor.kill_operator("kill:coordinator,step=1")
        await watching.until(lambda: supervisor.status.generation == 2)

    assert [(step.generation, step.step) for step in watching.steps] == [(1, 1), (2, 1)]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    evaluations = read_lines(tmp_path / "run" / "evaluations.jsonl", EvaluationRecord)
    samples = read_lines(tmp_path / "run" / "samples.jsonl", SampleRecord)
    assert [record.generation for record in evaluations] == [1, 2]
    assert [(record.generation, record.number) for record in samples] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert [record for record in watching.evaluations if isinstance(record, SampleRecord)] == list(samples)


def test_a_folder_is_refused_while_another_run_works_in_it(tmp_path: Path) -> None:
    with RunFolder(tmp_path), pytest.raises(FolderInUse, match="another `pretrain run` uses this folder"):
        RunFolder(tmp_path).__enter__()


def test_a_folder_is_free_after_its_run(tmp_path: Path) -> None:
    with RunFolder(tmp_path):
        pass

    with RunFolder(tmp_path) as folder:
        assert folder.read_status().job_uid


def test_a_status_that_is_none_is_refused_and_left_alone(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.status.write_text("{}}")

        with pytest.raises(UnreadableStatus, match="move it away"):
            folder.read_status()

        assert folder.status.read_text() == "{}}"


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl", "samples.jsonl"])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"step":1}\n{"ste')

    with RunFolder(tmp_path):
        assert (tmp_path / name).read_text() == '{"step":1}\n'
