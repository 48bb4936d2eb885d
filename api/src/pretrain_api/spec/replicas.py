"""Numbers of workers that fit a parallelism: multiples that hold whole replicas of the model."""

from __future__ import annotations

import math

from pretrain_api.spec.training import Parallelism


def replica_processes(parallelism: Parallelism) -> int:
    """Return the processes that hold one replica of the model: pipeline stages times tensor ranks."""
    return parallelism.tensor * parallelism.pipeline


def workers_per_replica(parallelism: Parallelism, processes: int) -> int:
    """Return the smallest number of workers that holds whole replicas; workers come in multiples of it."""
    replica = replica_processes(parallelism)
    return replica // math.gcd(replica, processes)


def round_up(workers: int, quantum: int) -> int:
    """Round a number of workers up to a multiple of the quantum."""
    return -(-workers // quantum) * quantum


def round_down(workers: int, quantum: int) -> int:
    """Round a number of workers down to a multiple of the quantum; the result may be 0."""
    return workers // quantum * quantum


def nearest(number: int, quantum: int) -> str:
    """Format the multiples of the quantum around a number: `2 or 4`."""
    below, above = round_down(number, quantum), round_up(number, quantum)
    return f"{below} or {above}" if 0 < below < above else str(above)


def misfit(parallelism: Parallelism, workers: int, processes: int) -> str | None:
    """Explain why the workers, with `processes` each, cannot train together, and which number can; None: they can."""
    replica, quantum = replica_processes(parallelism), workers_per_replica(parallelism, processes)
    if parallelism.shard == "hybrid" and processes % replica:
        return (
            f"shard hybrid shards within a worker, whose processes ({processes}) must hold whole replicas of "
            f"{_product(parallelism)} processes: set processesPerWorker to {nearest(processes, replica)}"
        )
    if workers % quantum:
        return (
            f"a replica of the model takes {_product(parallelism)} processes, and {workers} "
            f"worker{'s' * (workers > 1)} of {processes} hold no whole number of replicas: "
            f"use {nearest(workers, quantum)}"
        )
    return None


def _product(parallelism: Parallelism) -> str:
    return f"{replica_processes(parallelism)} (tensor {parallelism.tensor} x pipeline {parallelism.pipeline})"
