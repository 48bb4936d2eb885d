"""Validation of a job that the API server accepted, before any pod is created."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, cast

from pydantic import ValidationError

from pretrain_api.estimate.state_size import memory_checkpoint_bytes
from pretrain_api.spec.data import Source
from pretrain_api.spec.job import PretrainJob
from pretrain_api.spec.replicas import misfit
from pretrain_api.spec.support import unsupported
from pretrain_api.status.job import JobStatus
from pretrain_operator.kubernetes.client.api import Object
from pretrain_operator.kubernetes.workload.container import processes
from pretrain_operator.kubernetes.workload.quantity import parse_quantity
from pretrain_operator.kubernetes.workload.settings import PodSettings
from pretrain_operator.kubernetes.workload.template import AT, Template, read_template

_S3_URI = re.compile(r"s3://[a-z0-9][-.a-z0-9]*[a-z0-9](/.*)?")
_DATA = "spec.training.data"


class InvalidSpec(ValueError):
    """The job's spec needs a fix by its user. The text goes into the status."""


def parse_job(body: Object, settings: PodSettings) -> PretrainJob:
    """Parse a job from an object of the API server and set its processes per worker. Raises InvalidSpec with all of
    its problems."""
    try:
        job = PretrainJob.model_validate(
            {key: body.get(key) for key in ("apiVersion", "kind", "metadata", "spec")}, by_alias=True, by_name=False
        )
    except ValidationError as error:
        raise InvalidSpec("; ".join(_sentences(error))) from error
    if found := problems(job, settings):
        raise InvalidSpec("; ".join(found))
    counted = job.spec.workers.model_copy(update={"processes_per_worker": _processes(job)})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"workers": counted})})


def parse_status(body: Object) -> JobStatus:
    """Parse the job's last written status. Parts that this version cannot read are dropped, so that a status of
    another version does not stop the job."""
    written = cast(Object, body.get("status") or {})
    while True:
        try:
            return JobStatus.model_validate(written, by_alias=True, by_name=False)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            written = _without(written, first["loc"], unknown=first["type"] == "extra_forbidden")


def problems(job: PretrainJob, settings: PodSettings) -> tuple[str, ...]:
    """Return sentences that name a field, its error and the fix; none: pods can be created."""
    template = read_template(job.spec.workers.template)
    refused = (f"{found.path}: {found.message}" for found in unsupported(job.spec) if found.severity == "error")
    return (
        *refused,
        *_size_problems(job),
        *_uri_problems(job),
        *_hook_problems(job),
        *_storage_problems(job, template),
        *_memory_problems(job, template),
        *template.problems,
        *_account_problems(template, settings),
    )


def _processes(job: PretrainJob) -> int:
    return processes(job, read_template(job.spec.workers.template))


def _size_problems(job: PretrainJob) -> Iterator[str]:
    misfitting = misfit(job.spec.training.parallelism, job.spec.workers.replicas, _processes(job))
    if misfitting is not None:
        yield f"spec.workers.replicas: {misfitting}"


def _uri_problems(job: PretrainJob) -> Iterator[str]:
    training = job.spec.training
    held_out = training.evaluation.sources if training.evaluation is not None else ()
    uris = {
        f"{_DATA}.tokenizer": training.data.tokenizer,
        **_uris(f"{_DATA}.sources", training.data.sources),
        **_uris("spec.training.evaluation.sources", held_out),
        **({f"spec.{training.origin.field}": training.origin.uri} if training.origin is not None else {}),
    }
    for field, uri in uris.items():
        if not uri.startswith("/") and not _S3_URI.fullmatch(uri):
            yield (
                f"{field}: {uri!r} is neither s3://BUCKET/… nor an absolute path in the pods: "
                "copy the data to a bucket, or to a volume that spec.workers.template mounts"
            )


def _hook_problems(job: PretrainJob) -> Iterator[str]:
    evaluation = job.spec.training.evaluation
    file = evaluation.hook_file if evaluation is not None else None
    if file is not None and not file.startswith("/"):
        yield (
            f"spec.training.evaluation.hook: {file!r} is not absolute: give package.module:function of the workers' "
            "image, or the path of a file in the pods"
        )


def _uris(field: str, sources: Sequence[Source]) -> dict[str, str]:
    return {f"{field}[{place}].uri": source.uri for place, source in enumerate(sources)}


def _storage_problems(job: PretrainJob, template: Template) -> Iterator[str]:
    """Require a folder on a volume, which outlives the pod."""
    written = job.spec.checkpoint.storage.path
    if written is None:
        return
    field = f"spec.checkpoint.storage.path: {written!r}"
    path = PurePosixPath(written)
    if not path.is_absolute():
        yield f"{field} is not absolute: give the path at which the pods mount a shared volume, or use s3"
        return
    mounts = (mount.get("mountPath") for mount in template.worker.get("volumeMounts", ()))
    if not any(isinstance(mount, str) and path.is_relative_to(mount) for mount in mounts):
        yield f"{field} is on no volume: mount a shared one there in {AT}.spec.containers, or use s3"


def _memory_problems(job: PretrainJob, template: Template) -> Iterator[str]:
    """Check snapshots in memory against the container's limit. A lower bound: the tokeniser's vocabulary may add."""
    written = template.worker.get("resources", {}).get("limits", {}).get("memory")
    if written is None:
        return
    try:
        limit = parse_quantity(written)
    except ValueError as error:
        yield f"{AT}.spec.containers: resources.limits.memory {str(written)[:100]!r} is invalid: {error}"
        return
    needed = memory_checkpoint_bytes(job.spec, vocabulary=1, processes=_processes(job))
    if limit < needed:
        yield (
            f"spec.checkpoint.memory: a worker keeps {needed / 2**30:,.1f} GiB of snapshots in memory, and its "
            f"container is limited to {written}: raise resources.limits.memory in {AT}, or remove checkpoint.memory"
        )


def _account_problems(template: Template, settings: PodSettings) -> Iterator[str]:
    """Allow listed service accounts only, since a token of the account is in the pod."""
    account = template.pod.get("serviceAccountName")
    if account is not None and account not in settings.allowed_service_accounts:
        yield (
            f"{AT}.spec.serviceAccountName: {account!r} is not allowed: use one of "
            f"{', '.join(settings.allowed_service_accounts)}, or ask the administrator of the operator to allow it"
        )


def _sentences(error: ValidationError) -> Iterator[str]:
    for detail in error.errors(include_url=False):
        path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in detail["loc"]).lstrip(".")
        said = str(detail["ctx"]["error"]) if detail["type"] == "value_error" and "ctx" in detail else detail["msg"]
        yield f"{path}: {said}" if path else said


def _without(written: Object, location: tuple[int | str, ...], *, unknown: bool) -> Object:
    """Return the status without an unreadable part: the field if it is unknown, else its top-level field."""
    result = copy.deepcopy(written)
    *around, last = location if unknown else location[:1]
    place: Any = result
    for key in around:
        place = place[key]
    del place[last]
    return result
