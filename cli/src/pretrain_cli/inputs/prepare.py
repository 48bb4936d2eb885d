"""From what the user asked for to a job that can run: overrides, resolved paths, checked faults, checked data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pretrain_api.spec.job import PretrainJob, Workers
from pretrain_api.spec.replicas import worker_unit
from pretrain_cli.inputs.faults import Fault, parse_fault, plan_faults
from pretrain_cli.inputs.job_file import load_job
from pretrain_cli.inputs.preflight import check, resolve_uris
from pretrain_cli.render.tensorboard import require


@dataclass(frozen=True)
class Order:
    """The command line of `pretrain run`."""

    job_file: Path
    workers: int | None
    out: Path | None
    sets: tuple[str, ...]
    faults: tuple[str, ...]
    tensorboard: bool = False


@dataclass(frozen=True)
class Prepared:
    """A run that may begin."""

    job: PretrainJob
    """Its URIs are absolute."""
    out: Path
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]
    """What the user should know of it."""
    tensorboard: bool = False
    """Event files are wanted as well."""


def prepare(order: Order, environ: Mapping[str, str]) -> Prepared:
    """Check everything that can be checked before a process starts. Raises InvalidJob and BadInput; writes nothing."""
    if order.tensorboard:
        require()
    parsed = load_job(order.job_file, order.sets)
    out = (order.out or Path("runs") / parsed.metadata.name).absolute()
    job = with_workers(parsed, order.workers) if order.workers is not None else parsed
    workers = job.spec.workers
    processes = workers.processes_per_worker or 1
    planned = plan_faults(
        [parse_fault(text) for text in order.faults],
        workers.replicas,
        processes,
        job.spec.training.total_steps,
        worker_unit(job.spec.training.parallelism, processes),
    )
    widened = _widened(workers, planned.fewest, planned.most)
    resolved = check(resolve_uris(_replace_workers(job, widened), order.job_file, out), environ)
    notes = [f"{finding.path}: {finding.message}" for finding in resolved.warnings]
    if widened != workers:
        low, high = widened.elastic.min, widened.max
        notes.append(f"elastic is {low} to {high} workers in this run, to hold what --fault asks for")
    return Prepared(resolved.job, out, planned.faults, tuple(notes), order.tensorboard)


def with_workers(job: PretrainJob, replicas: int) -> PretrainJob:
    """The job with so many workers wanted; its bounds are widened to hold them."""
    workers = job.spec.workers.model_copy(update={"replicas": replicas})
    return _replace_workers(job, _widened(workers, replicas, replicas))


def _widened(workers: Workers, fewest: int, most: int) -> Workers:
    low, high = min(workers.elastic.min, fewest), max(workers.max, most)
    if (low, high) == (workers.elastic.min, workers.max):
        return workers
    elastic = workers.elastic.model_copy(update={"min": low, "max": high})
    return workers.model_copy(update={"elastic": elastic})


def _replace_workers(job: PretrainJob, workers: Workers) -> PretrainJob:
    return job.model_copy(update={"spec": job.spec.model_copy(update={"workers": workers})})
