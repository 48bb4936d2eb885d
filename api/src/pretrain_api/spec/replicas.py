"""How many workers fit a parallelism: they come in multiples that hold whole replicas of the model."""

from __future__ import annotations

import math

from pretrain_api.spec.training import Parallelism


def replica_processes(parallelism: Parallelism) -> int:
    """Processes that hold one replica of the model: its pipeline stages, each on so many tensor ranks."""
    return parallelism.tensor * parallelism.pipeline


def worker_unit(parallelism: Parallelism, processes: int) -> int:
    """Workers come in multiples of this, where each has so many processes: the fewest that hold whole replicas."""
    replica = replica_processes(parallelism)
    return replica // math.gcd(replica, processes)


def up_to_unit(workers: int, unit: int) -> int:
    """The fewest workers that fit and are no fewer than these."""
    return -(-workers // unit) * unit


def down_to_unit(workers: int, unit: int) -> int:
    """The most workers that fit and are no more than these; may be 0."""
    return workers // unit * unit


def nearest(number: int, unit: int) -> str:
    """The sizes around a number that is no multiple of the unit, for a sentence: `2 or 4`."""
    below, above = down_to_unit(number, unit), up_to_unit(number, unit)
    return f"{below} or {above}" if 0 < below < above else str(above)


def misfit(parallelism: Parallelism, workers: int, processes: int) -> str | None:
    """Why so many workers of so many processes each cannot train together, and how many can; None: they can."""
    replica, unit = replica_processes(parallelism), worker_unit(parallelism, processes)
    if parallelism.shard == "hybrid" and processes % replica:
        return (
            f"shard hybrid shards within a worker, whose processes ({processes}) must hold whole replicas of "
            f"{_product(parallelism)} processes: set processesPerWorker to {nearest(processes, replica)}"
        )
    if workers % unit:
        return (
            f"a replica of the model takes {_product(parallelism)} processes, so that {workers} "
            f"worker{'s' * (workers > 1)} of {processes} cannot be filled: use {nearest(workers, unit)}"
        )
    return None


def _product(parallelism: Parallelism) -> str:
    return f"{replica_processes(parallelism)} (tensor {parallelism.tensor} x pipeline {parallelism.pipeline})"
