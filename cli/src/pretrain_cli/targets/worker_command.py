"""Command lines of a local run's workers."""

from __future__ import annotations

import sys

from pretrain_api.spec.job import PretrainJob
from pretrain_operator.agent_command import agent_arguments
from pretrain_operator.local.pods import WorkerCommand
from pretrain_operator.local.run_folder import RunFolder

THREADS = 1
"""CPU threads of a training process: workers share the machine, and the number changes numerical results."""


def worker_command(
    folder: RunFolder, job: PretrainJob, job_uid: str, slot: int, attempt: int, port: int
) -> WorkerCommand:
    """Build the command line of a worker's agent, whose coordinator listens on `port`."""
    name = f"worker-{slot}.{attempt}"
    options = {
        "--coordinator": f"ws://127.0.0.1:{port}/v1/jobs/{job_uid}/agents",
        "--job-uid": job_uid,
        "--slot": slot,
        "--attempt": attempt,
        "--host": "127.0.0.1",
        "--node": f"local-{slot}",
        "--processes": job.spec.workers.processes_per_worker or 1,
    }
    program = ("-m", "pretrain_trainer", str(folder.trainer_config))
    environment = {"OMP_NUM_THREADS": str(THREADS)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = (sys.executable, "-m", "pretrain_agent", *agent_arguments(options, job.spec), "--", *program)
    return WorkerCommand(command, environment, folder.logs / f"{name}.log")
