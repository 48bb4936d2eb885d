"""The parts of `pretrain run`: workers wanted, going on from an earlier run, injecting faults, starting workers."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import psutil
import pytest

from pretrain_api.messages.trainer_config import trainer_config
from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import Bookkeeping, JobStatus, SlotMemory, WorkerStatus
from pretrain_cli.errors import BadInput
from pretrain_cli.inputs.faults import parse_fault
from pretrain_cli.inputs.job_file import load_job
from pretrain_cli.inputs.prepare import with_workers
from pretrain_cli.targets.fault_injection import FaultInjector
from pretrain_cli.targets.previous_run import check_same_job, is_complete, next_status, wall_seconds, write_job
from pretrain_cli.targets.worker_command import worker_command
from pretrain_operator.local.run_folder import RunFolder
from pretrain_operator.local.supervisor import Supervisor
from support.operator.supervisor import a_job


@pytest.mark.parametrize(("replicas", "bounds"), [(2, (1, 8)), (12, (1, 12))])
def test_the_bounds_hold_the_workers_that_are_wanted(replicas: int, bounds: tuple[int, int]) -> None:
    workers = with_workers(a_job(), replicas).spec.workers

    assert (workers.replicas, workers.elastic.min, workers.max) == (replicas, *bounds)


def test_the_lower_bound_gives_way_too() -> None:
    high = with_workers(a_job(), 8)
    elastic = high.spec.workers.elastic.model_copy(update={"min": 4})
    workers = high.spec.workers.model_copy(update={"elastic": elastic})
    job = high.model_copy(update={"spec": high.spec.model_copy(update={"workers": workers})})

    assert with_workers(job, 2).spec.workers.elastic.min == 2


def test_a_new_run_keeps_the_history_and_forgives_failures() -> None:
    books = Bookkeeping(
        state="training", counted_until=5.0, restarts=(1.0, 2.0), slots=(SlotMemory(slot=0, attempt=3, failures=2),)
    )
    ended = JobStatus(phase="Failed", reason="BudgetExhausted", job_uid="uid", generation=7, step=40, bookkeeping=books)

    status = next_status(ended, total_steps=100)

    assert (status.phase, status.reason, status.total_steps) == ("Pending", "", 100)
    assert (status.job_uid, status.generation, status.step) == ("uid", 7, 40)
    assert status.bookkeeping.restarts == ()
    assert status.bookkeeping.counted_until is None, "the time between the runs counts as nothing"
    assert [(memory.attempt, memory.failures) for memory in status.bookkeeping.slots] == [(3, 0)]


@pytest.mark.parametrize(
    ("phase", "step", "complete"), [("Succeeded", 100, True), ("Succeeded", 50, False), ("Failed", 100, False)]
)
def test_a_run_is_complete_with_its_last_step(phase: str, step: int, complete: bool) -> None:
    assert is_complete(JobStatus.model_validate({"phase": phase, "step": step}), 100) is complete


def test_the_kept_job_is_a_job_file_again(tmp_path: Path) -> None:
    training = a_job().spec.training
    optimizer = training.optimizer.model_copy(update={"clip": None})  # null says something else than nothing
    training = training.model_copy(update={"optimizer": optimizer})
    job = a_job().model_copy(update={"spec": a_job().spec.model_copy(update={"training": training})})
    with RunFolder(tmp_path) as folder:
        write_job(folder, job)

        assert load_job(folder.job) == job
        check_same_job(folder, job)


def test_a_kept_job_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.job.write_text("[")

        with pytest.raises(BadInput, match=r"job\.yaml cannot be read; choose another --out"):
            check_same_job(folder, a_job())


def test_without_a_report_no_time_was_spent_before(tmp_path: Path) -> None:
    assert wall_seconds(RunFolder(tmp_path)) == 0.0


def test_a_worker_is_an_agent_with_the_trainer_behind_it(tmp_path: Path) -> None:
    command = worker_command(RunFolder(tmp_path), a_job(processes=2), "uid", slot=1, attempt=3, port=4711)

    own, program = " ".join(command.arguments).split(" -- ")
    assert "--coordinator ws://127.0.0.1:4711/v1/jobs/uid/agents --job-uid uid --slot 1 --attempt 3" in own
    assert "--processes 2 --preload pretrain_trainer.preload" in own
    assert program == f"-m pretrain_trainer {tmp_path}/trainer.json"
    assert command.environment["OMP_NUM_THREADS"] == "1"
    assert command.log == tmp_path / "logs" / "worker-1.3.log"


def test_the_trainer_is_told_the_whole_training() -> None:
    config = trainer_config(a_job(), "uid")

    assert (config.job_name, config.job_uid, config.training) == ("tiny", "uid", a_job().spec.training)


@dataclass
class FakeSupervisor:
    """Remembers what was done to it; `workers` maps a slot to the pids of its agent and ranks."""

    workers: dict[int, list[int]]
    status: JobStatus = field(default_factory=JobStatus)
    operator_runs: bool = True
    job: PretrainJob = field(default_factory=a_job)
    done: list[object] = field(default_factory=list)

    def processes(self, slot: int) -> tuple[FakeProcess, ...]:
        return tuple(FakeProcess(pid) for pid in self.workers.get(slot, []))

    def inject(self, text: str, slot: int, processes: Sequence[psutil.Process], number: signal.Signals) -> None:
        self.done.append((text, slot, [process.pid for process in processes], number))

    def scale(self, replicas: int, description: str) -> None:
        self.job = with_workers(self.job, replicas)
        self.done.append((replicas, description))

    def kill_operator(self, text: str) -> bool:
        if self.operator_runs:
            self.done.append(text)
        return self.operator_runs


@dataclass(frozen=True)
class FakeProcess:
    pid: int


def an_injector(supervisor: FakeSupervisor, *faults: str) -> FaultInjector:
    return FaultInjector([parse_fault(text) for text in faults], cast(Supervisor, supervisor))


@pytest.mark.parametrize(
    ("fault", "pids", "number"),
    [
        ("kill:worker=1,step=5", [20, 21], signal.SIGKILL),
        ("kill:agent=1,step=5", [20], signal.SIGKILL),
        ("stop:worker=1,step=5", [20, 21], signal.SIGSTOP),
        ("term:worker=1,step=5", [20], signal.SIGTERM),
    ],
)
def test_a_fault_signals_its_processes_once_its_step_is_done(
    fault: str, pids: list[int], number: signal.Signals
) -> None:
    supervisor = FakeSupervisor({0: [10, 11], 1: [20, 21]})
    injector = an_injector(supervisor, fault)

    injector.advance(4)
    assert supervisor.done == []

    injector.advance(5)
    injector.advance(6)
    assert supervisor.done == [(fault, 1, pids, number)]


def test_a_fault_waits_for_its_target() -> None:
    supervisor = FakeSupervisor({})
    injector = an_injector(supervisor, "kill:worker=1,step=5")

    injector.advance(5)
    assert len(injector.pending) == 1

    supervisor.workers[1] = [30]
    injector.advance(5)
    assert supervisor.done == [("kill:worker=1,step=5", 1, [30], signal.SIGKILL)]
    assert injector.pending == ()


def test_a_rank_is_killed_by_its_number_and_only_while_it_is_the_workers_own() -> None:
    status = JobStatus(workers=(WorkerStatus(slot=1, attempt=0, state="Training", pids={2: 21, 3: 22}),))
    supervisor = FakeSupervisor({1: [20, 99]}, status)
    injector = an_injector(supervisor, "kill:rank=3,step=5")

    injector.advance(5)
    assert supervisor.done == [], "the status still names a process of the generation before"

    supervisor.workers[1] = [20, 21, 22]
    supervisor.status = JobStatus()  # of a restarted operator, which was not told the ranks' processes
    injector.advance(5)
    assert supervisor.done == [("kill:rank=3,step=5", 1, [22], signal.SIGKILL)]


def test_workers_are_added_and_removed_one_by_one() -> None:
    supervisor = FakeSupervisor({})

    an_injector(supervisor, "add:worker=7,step=1", "add:,step=1", "remove:worker,step=2").advance(2)

    assert [done[0] for done in cast(list[tuple[int, str]], supervisor.done)] == [3, 4, 3]


def test_the_coordinator_is_killed_when_it_runs() -> None:
    supervisor = FakeSupervisor({}, operator_runs=False)
    injector = an_injector(supervisor, "kill:coordinator,step=1")

    injector.advance(1)
    supervisor.operator_runs = True
    injector.advance(1)

    assert supervisor.done == ["kill:coordinator,step=1"]
