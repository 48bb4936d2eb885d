"""Preparation of a run: applies overrides, resolves paths, checks faults, data and storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pretrain_api.spec.job import PretrainJob, Workers
from pretrain_api.spec.replicas import workers_per_replica
from pretrain_cli.inputs.faults import Fault, parse_fault, plan_faults
from pretrain_cli.inputs.job_file import load_job
from pretrain_cli.inputs.preflight import check, resolve_uris


@dataclass(frozen=True)
class RunOptions:
    """Arguments of `pretrain run`."""

    job_file: Path
    workers: int | None
    out: Path | None
    sets: tuple[str, ...]
    faults: tuple[str, ...]
    tensorboard: bool = False


@dataclass(frozen=True)
class PreparedJob:
    """Checked run, ready to start."""

    job: PretrainJob
    """Job with absolute URIs."""
    out: Path
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]
    """Notes for the user."""
    tensorboard: bool = False
    """Write TensorBoard event files too."""


def prepare(options: RunOptions, environ: Mapping[str, str]) -> PreparedJob:
    """Check everything that can be checked before a process starts. Raises InvalidJob and BadInput; writes nothing."""
    parsed = load_job(options.job_file, options.sets)
    out = (options.out or Path("runs") / parsed.metadata.name).absolute()
    job = with_workers(parsed, options.workers) if options.workers is not None else parsed
    workers = job.spec.workers
    processes = workers.processes_per_worker or 1
    planned = plan_faults(
        [parse_fault(text) for text in options.faults],
        workers.replicas,
        processes,
        job.spec.training.total_steps,
        workers_per_replica(job.spec.training.parallelism, processes),
    )
    widened = _widened(workers, planned.fewest, planned.most)
    resolved = check(resolve_uris(_replace_workers(job, widened), options.job_file, out), environ)
    notes = [f"{finding.path}: {finding.message}" for finding in resolved.warnings]
    if widened != workers:
        low, high = widened.elastic.min, widened.max
        notes.append(f"elastic is widened to {low} to {high} workers in this run, as --fault requires")
    return PreparedJob(resolved.job, out, planned.faults, tuple(notes), options.tensorboard)


def with_workers(job: PretrainJob, replicas: int) -> PretrainJob:
    """Set the desired number of workers and widen the elastic bounds to hold it."""
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
