"""A supervisor with a fake operator and workers that only sleep."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import EvaluationResult, StepRecord
from pretrain_operator.cluster import Event
from pretrain_operator.local import parent_death
from pretrain_operator.local.pods import WorkerCommand
from pretrain_operator.local.run_folder import RunFolder
from pretrain_operator.local.supervisor import Supervisor, SupervisorConfig

FAKE_OPERATOR = Path(__file__).with_name("fake_operator.py")

WORKER = f"""
import os, subprocess, sys, time
command = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
tied = [sys.executable, "-I", "-S", {parent_death.__file__!r}, str(os.getpid()), *command]
child = subprocess.Popen(tied, start_new_session=True)
time.sleep(600)
"""
"""An agent with a rank in a session of its own that dies with it."""


def a_job(replicas: int = 2, processes: int | None = None) -> PretrainJob:
    return PretrainJob.model_validate(
        {
            "apiVersion": "pretrain.dev/v1alpha1",
            "kind": "PretrainJob",
            "metadata": {"name": "tiny"},
            "spec": {
                "workers": {"replicas": replicas, "elastic": {"min": 1, "max": 8}, "processesPerWorker": processes},
                "training": {
                    "model": {"preset": "gpt2-tiny"},
                    "data": {"tokenizer": "/tokenizer.json", "sources": [{"name": "a", "uri": "/a"}]},
                    "steps": 10,
                },
                "checkpoint": {"storage": {"path": "checkpoints"}},
            },
        }
    )


@dataclass
class Watching:
    """An audience that remembers, and lets tests wait for a condition."""

    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationResult] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    statuses: list[JobStatus] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)
        self.changed.set()

    def evaluation(self, record: EvaluationResult) -> None:
        self.evaluations.append(record)
        self.changed.set()

    def event(self, event: Event) -> None:
        self.events.append(event)
        self.changed.set()

    def status(self, status: JobStatus) -> None:
        self.statuses.append(status)
        self.changed.set()

    @property
    def epochs(self) -> list[str]:
        return [event.message for event in self.events if event.reason == "Epoch"]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def sleeping_worker(folder: RunFolder, script: str = WORKER) -> Callable[[int, int, int], WorkerCommand]:
    return lambda slot, attempt, port: WorkerCommand(
        (sys.executable, "-S", "-c", script), {}, folder.logs / f"worker-{slot}.{attempt}.log"
    )


def a_supervisor(folder: RunFolder, watching: Watching, replicas: int = 2, script: str = WORKER) -> Supervisor:
    setting = SupervisorConfig(
        folder, watching, sleeping_worker(folder, script), operator=(sys.executable, str(FAKE_OPERATOR)), crashes=3
    )
    return Supervisor(setting, a_job(replicas), JobStatus(job_uid="uid"))


def kill_worker(supervisor: Supervisor, slot: int) -> None:
    supervisor.inject(f"kill:worker={slot}", slot, supervisor.processes(slot), signal.SIGKILL)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
