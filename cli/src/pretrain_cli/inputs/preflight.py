"""Checks of a job before anything is started: its URIs, data and storage."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from pydantic import ValidationError

from pretrain_api.checkpoint.identity import differences, job_identity
from pretrain_api.checkpoint.lineage import IDENTITY_KEY, JobIdentity
from pretrain_api.dataset import Dataset
from pretrain_api.estimate.state_size import memory_checkpoint_bytes
from pretrain_api.problems import InvalidJob, Problem
from pretrain_api.spec.data import Data, Evaluation, Source
from pretrain_api.spec.job import PretrainJob, PretrainJobSpec, Storage
from pretrain_api.spec.model import ResolvedModel, resolve
from pretrain_api.spec.replicas import misfit
from pretrain_api.spec.support import Finding, unsupported
from pretrain_api.spec.training import From, Training
from pretrain_data.verification import (
    TokenizerFile,
    check_fit,
    check_remote_shards,
    check_shards,
    check_tokenizer,
    check_vocabulary,
    read_dataset,
)
from pretrain_store.errors import InvalidOrigin, ObjectNotFound, StoreError
from pretrain_store.history import read_listing
from pretrain_store.open import S3Service, is_remote, open_store, probe
from pretrain_store.origin import choose_checkpoint, open_origin, recorded, weight_files
from pretrain_store.port import FEW_RETRIES, ObjectStore, Readable

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_DATA = "spec.training.data"
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class StorageAccess:
    """Storage of a job and the environment with its credentials."""

    storage: Storage
    environ: Mapping[str, str]

    def open(self) -> ObjectStore:
        """Open the job's own store."""
        return open_store(self.storage, self.environ)

    def origin(self, start: From) -> Readable:
        """Open the source of the initial weights."""
        return open_origin(start, self.storage, self.environ, FEW_RETRIES)

    def service(self) -> S3Service:
        """Return the service that sources are read from."""
        return S3Service(self.storage, self.environ, FEW_RETRIES)


@dataclass(frozen=True)
class ResolvedJob:
    """Checked job, with its model, datasets and identity."""

    job: PretrainJob
    model: ResolvedModel
    datasets: tuple[Dataset, ...]
    """Datasets of `training.data.sources`, in that order."""
    identity: JobIdentity
    warnings: tuple[Finding, ...]
    """Values that this version does not support and ignores."""


def resolve_uris(job: PretrainJob, job_file: Path, out_dir: Path) -> PretrainJob:
    """Resolve a job's URIs to absolute paths and s3:// URIs. Raises InvalidJob for other schemes.

    Data URIs are relative to the job file's folder, `checkpoint.storage.path` to `out_dir`.
    """
    training, storage = job.spec.training, job.spec.checkpoint.storage
    problems: list[Problem] = []

    def absolute(uri: str, field: str) -> str:
        found = _absolute(uri, field, job_file.parent)
        if isinstance(found, Problem):
            problems.append(found)
            return uri
        return found

    def all_absolute(sources: Sequence[Source], field: str) -> tuple[Source, ...]:
        return tuple(
            source.model_copy(update={"uri": absolute(source.uri, f"{field}[{index}].uri")})
            for index, source in enumerate(sources)
        )

    data = training.data.model_copy(
        update={
            "tokenizer": absolute(training.data.tokenizer, f"{_DATA}.tokenizer"),
            "sources": all_absolute(training.data.sources, f"{_DATA}.sources"),
        }
    )
    evaluation = training.evaluation and training.evaluation.model_copy(
        update={
            "sources": all_absolute(training.evaluation.sources, "spec.training.evaluation.sources"),
            "hook": _absolute_hook(training.evaluation, job_file.parent),
        }
    )
    origin = training.origin and _origin(training.origin, absolute)
    if problems:
        raise InvalidJob(job.metadata.name, problems)
    if storage.path is not None:
        storage = Storage(path=os.path.abspath(out_dir / storage.path))
    return _replaced(job, training, data, evaluation, origin, storage)


def check(job: PretrainJob, environ: Mapping[str, str] = os.environ) -> ResolvedJob:
    """Check a job with absolute URIs. Raises InvalidJob with all mistakes; leaves no files behind."""
    training, model = job.spec.training, resolve(job.spec.training.model)
    findings = unsupported(job.spec)
    problems = [Problem(finding.path, finding.message) for finding in findings if finding.severity == "error"]
    workers = job.spec.workers
    if misfitting := misfit(training.parallelism, workers.replicas, workers.processes_per_worker or 1):
        problems.append(Problem("spec.workers.replicas", misfitting))
    access = StorageAccess(job.spec.checkpoint.storage, environ)
    service = access.service()
    tokenizer = check_tokenizer(training.data.tokenizer, f"{_DATA}.tokenizer", service)
    if isinstance(tokenizer, Problem):
        problems.append(tokenizer)
        tokenizer = None
    else:
        problems += check_vocabulary(tokenizer, model)
    datasets = _check_sources(training, model, tokenizer, service, problems)
    problems += _check_hook(training.evaluation)
    problems += _check_storage(access)
    if tokenizer is not None:
        problems += _check_memory(job.spec, tokenizer.vocabulary)
    if problems or tokenizer is None:
        raise InvalidJob(job.metadata.name, problems)
    identity = job_identity(training, model, datasets, tokenizer.digest)
    if problem := _other_job(access, identity) or _unfit_origin(access, training.origin, identity, tokenizer.content):
        raise InvalidJob(job.metadata.name, (problem,))
    warnings = tuple(finding for finding in findings if finding.severity == "warning")
    return ResolvedJob(job, model, datasets, identity, warnings)


def _absolute(uri: str, field: str, base_dir: Path) -> str | Problem:
    match = _SCHEME.match(uri)
    if match is None:
        return os.path.abspath(base_dir / uri)
    if match[1] == "s3":
        return uri
    parsed = urlparse(uri)
    if parsed.scheme != "file":
        return Problem(
            field, f"{match[1]}://: unknown scheme, use s3://…, file:///… or a path relative to the job file"
        )
    if parsed.netloc not in ("", "localhost"):
        return Problem(field, f"{uri} names a host: write a local folder with three slashes, file:///…")
    return os.path.abspath(unquote(parsed.path))


def _absolute_hook(evaluation: Evaluation, base_dir: Path) -> str | None:
    if evaluation.hook is None or evaluation.hook_file is None:
        return evaluation.hook
    return os.path.abspath(base_dir / evaluation.hook)


def _origin(origin: From, absolute: Callable[[str, str], str]) -> From:
    """Resolve the path; the folder of a run stands for its checkpoints."""
    if origin.run is None:
        return origin.model_copy(update={"hugging_face": absolute(origin.uri, "spec.training.from.huggingFace")})
    uri = absolute(origin.run, "spec.training.from.run")
    below = Path(uri) / "checkpoints"
    of_a_run = not is_remote(uri) and not (Path(uri) / IDENTITY_KEY).exists() and (below / IDENTITY_KEY).exists()
    return origin.model_copy(update={"run": str(below) if of_a_run else uri})


def _replaced(
    job: PretrainJob,
    training: Training,
    data: Data,
    evaluation: Evaluation | None,
    origin: From | None,
    storage: Storage,
) -> PretrainJob:
    """Replace these parts of the job without validating them again."""
    checkpoint = job.spec.checkpoint.model_copy(update={"storage": storage})
    resolved = training.model_copy(update={"data": data, "evaluation": evaluation, "origin": origin})
    spec = job.spec.model_copy(update={"training": resolved, "checkpoint": checkpoint})
    return job.model_copy(update={"spec": spec})


def _check_sources(
    training: Training,
    model: ResolvedModel,
    tokenizer: TokenizerFile | None,
    service: S3Service,
    problems: list[Problem],
) -> tuple[Dataset, ...]:
    """Return the datasets of the training sources; add problems of all sources to `problems`."""
    held_out = training.evaluation.sources if training.evaluation else ()
    fields = (
        *((f"{_DATA}.sources[{index}]", source) for index, source in enumerate(training.data.sources)),
        *((f"spec.training.evaluation.sources[{index}]", source) for index, source in enumerate(held_out)),
    )
    whole: list[tuple[str, str, Dataset]] = []
    for field, source in fields:
        dataset = read_dataset(source, field, service)
        if isinstance(dataset, Problem):
            problems.append(dataset)
            continue
        problems += check_fit(dataset, source.uri, field, tokenizer, model)
        whole.append((field, source.uri, dataset))
    for field, uri, dataset in whole:
        problems += check_remote_shards(field, uri, dataset, service) if is_remote(uri) else ()
    problems += check_shards([item for item in whole if not is_remote(item[1])])
    return tuple(dataset for field, _, dataset in whole if field.startswith(_DATA))


def _check_hook(evaluation: Evaluation | None) -> Iterator[Problem]:
    """Compile a hook's file without running it; modules are checked by the ranks."""
    file = evaluation.hook_file if evaluation is not None else None
    if file is None:
        return
    try:
        compile(Path(file).read_bytes(), file, "exec")
    except OSError as error:
        said = f"{file} cannot be read ({error.strerror}): correct the path"
        yield Problem("spec.training.evaluation.hook", said)
    except (SyntaxError, ValueError) as error:
        yield Problem("spec.training.evaluation.hook", f"{file} is not valid Python ({error}): fix it")


def _check_storage(access: StorageAccess) -> Iterator[Problem]:
    """Check that a folder is writable, without creating it, or that a bucket supports conditional puts."""
    if access.storage.path is not None:
        said = _unwritable(Path(access.storage.path))
        if said is not None:
            yield Problem("spec.checkpoint.storage.path", f"{said}: choose a writable folder")
        return
    try:
        probe(access.open())
    except StoreError as error:
        yield Problem("spec.checkpoint.storage.s3", str(error))


def _check_memory(spec: PretrainJobSpec, vocabulary: int) -> Iterator[Problem]:
    """Check that in-memory checkpoints of all workers fit in this machine's shared memory."""
    needed = spec.workers.replicas * memory_checkpoint_bytes(spec, vocabulary)
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    if needed > free:
        yield Problem(
            "spec.checkpoint.memory",
            f"{spec.workers.replicas} workers keep {needed / 2**30:,.1f} GiB in {SHARED_MEMORY}, which has "
            f"{free / 2**30:,.1f} GiB free: enlarge it, run fewer workers, or leave checkpoint.memory out",
        )


def _unwritable(folder: Path) -> str | None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        return f"{existing} is a file"
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"{existing} is not writable ({error.strerror})"


def _unfit_origin(access: StorageAccess, start: From | None, identity: JobIdentity, tokenizer: bytes) -> Problem | None:
    """Check that the initial weights can be used."""
    if start is None:
        return None
    try:
        own, there = access.open(), access.origin(start)
        pinned = recorded(own, start)
        if pinned is not None and read_listing(own).manifests:
            return None
        if start.run is not None:
            choose_checkpoint(there, start, identity, pinned)
        else:
            weight_files(there, start, identity, tokenizer)
    except InvalidOrigin as unfit:
        field, _, said = str(unfit).partition(": ")
        return Problem(f"spec.{field}", said)
    except StoreError as error:
        return Problem(
            f"spec.{start.field}", f"{start.uri} cannot be read ({error}): correct the URI or fix the storage"
        )
    return None


def _other_job(access: StorageAccess, identity: JobIdentity) -> Problem | None:
    """Check that the prefix holds no other job's history."""
    field = "spec.checkpoint.storage.path" if access.storage.path is not None else "spec.checkpoint.storage.s3"
    store = access.open()
    try:
        found = JobIdentity.from_json(store.get(IDENTITY_KEY))
    except ObjectNotFound:
        return None
    except ValidationError:
        said = f"{store.describe()}: {IDENTITY_KEY} there cannot be read: choose another location"
        return Problem(field, said)
    except StoreError as error:
        return Problem(field, str(error))
    differing = differences(found, identity)
    if not differing:
        return None
    said = f"{store.describe()} belongs to another job with different {' and '.join(differing)}"
    return Problem(field, f"{said}: choose another location, or use the values that it was started with")
