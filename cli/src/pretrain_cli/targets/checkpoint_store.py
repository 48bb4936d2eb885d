"""Checkpoint store of a run, found from a folder, a job file or a URI. Read-only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pretrain_api.spec.job import PretrainJob, Retain, Storage
from pretrain_cli.errors import BadInput
from pretrain_cli.inputs.job_file import load_job
from pretrain_cli.inputs.preflight import resolve_uris
from pretrain_store.directory import DirectoryStore
from pretrain_store.open import S3Service, is_remote, open_store
from pretrain_store.port import FEW_RETRIES, Readable, RetryLimits

JOB_FILE = "job.yaml"
_ANY_FOLDER = Storage(path=".")
"""Storage for a URI, whose service comes from the environment alone."""
_STORE_FILES = ("job.json", "lineage", "checkpoints")


def job_of(run: Path) -> PretrainJob:
    """Load the job of a run's folder, or a job file, whose run is in the default folder of `pretrain run`.

    Raises InvalidJob and BadInput.
    """
    if not run.is_dir():
        job = load_job(run)
        return resolve_uris(job, run, Path("runs") / job.metadata.name)
    if not (run / JOB_FILE).is_file():
        raise BadInput(
            f"{run} is not the folder of a run, since it has no {JOB_FILE}: give the `--out` folder of `pretrain run`"
        )
    job = load_job(run / JOB_FILE)
    path = job.spec.checkpoint.storage.path
    moved = run.absolute() / Path(path).name if path is not None and not Path(path).exists() else None
    if moved is None or not moved.is_dir():
        return job
    checkpoint = job.spec.checkpoint.model_copy(update={"storage": Storage(path=str(moved))})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"checkpoint": checkpoint})})


def open_named(
    name: str, environ: Mapping[str, str], limits: RetryLimits = FEW_RETRIES
) -> tuple[Readable, Retain | None]:
    """Open the store of a run's folder, a job file, an s3:// URI or the store's own folder.

    Also returns the job's retention, if there is a job. Raises InvalidJob, BadInput and StoreError.
    """
    if is_remote(name):
        return S3Service(_ANY_FOLDER, environ, limits).folder(name), None
    path = Path(name)
    if not path.exists():
        raise BadInput(
            f"there is no {name}: give a run's folder, a job file, or a checkpoint.storage as s3://… or path"
        )
    if path.is_dir() and not (path / JOB_FILE).is_file():
        if not any((path / part).exists() for part in _STORE_FILES):
            raise BadInput(
                f"{name} is neither the folder of a run, since it has no {JOB_FILE}, nor a checkpoint store: give the "
                "`--out` folder of `pretrain run`, or the checkpoint.storage.path"
            )
        return DirectoryStore(path), None
    checkpoint = job_of(path).spec.checkpoint
    if checkpoint.storage.path is None:
        return open_store(checkpoint.storage, environ, limits), checkpoint.retain
    folder = Path(checkpoint.storage.path)
    if not folder.is_dir():
        raise BadInput(f"there is no {folder}, the checkpoint folder of {name}: start the run, or give its folder")
    return DirectoryStore(folder), checkpoint.retain
