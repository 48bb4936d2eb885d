"""Size of a job: members of a generation, slots that need a pod."""

from __future__ import annotations

from collections.abc import Iterable

from pretrain_api.spec.job import PretrainJob
from pretrain_api.spec.replicas import round_down, round_up, workers_per_replica
from pretrain_operator.cluster import Pod


def replica_quantum(job: PretrainJob) -> int:
    """Return the number of workers per replica of the model: generations contain whole replicas."""
    return workers_per_replica(job.spec.training.parallelism, job.spec.workers.processes_per_worker or 1)


def min_members(job: PretrainJob) -> int:
    """Return the minimum size of a generation."""
    return round_up(job.spec.workers.elastic.min, replica_quantum(job))


def wanted_replicas(job: PretrainJob) -> int:
    """Return the desired size of a generation."""
    workers = job.spec.workers
    return max(min_members(job), round_down(min(workers.replicas, workers.max), replica_quantum(job)))


def wanted_slots(job: PretrainJob) -> range:
    """Return the slots that need a live pod each, spares included."""
    return range(wanted_replicas(job) + job.spec.workers.spares)


def missing_slots(job: PretrainJob, pods: Iterable[Pod]) -> tuple[int, ...]:
    """Return the wanted slots without a live pod."""
    alive = {pod.slot for pod in pods if pod.alive}
    return tuple(slot for slot in wanted_slots(job) if slot not in alive)
