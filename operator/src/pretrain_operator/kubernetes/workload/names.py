"""Names, labels and owner references of a job's children."""

from __future__ import annotations

from typing import NamedTuple, cast

from pretrain_api.spec.job import API_VERSION, KIND, PretrainJob
from pretrain_operator.kubernetes.client.api import Object

LABEL_PREFIX = "pretrain.dev/"
JOB_LABEL = f"{LABEL_PREFIX}job"
UID_LABEL = f"{LABEL_PREFIX}job-uid"
SLOT_LABEL = f"{LABEL_PREFIX}slot"
ATTEMPT_LABEL = f"{LABEL_PREFIX}attempt"
WORKER_SELECTOR = UID_LABEL
"""Label selector of all worker pods."""
UID_CHARACTERS = 5
"""Characters of the job's uid in names: a recreated job gets children of its own."""


class WorkerPod(NamedTuple):
    """Identity of a worker pod."""

    job_uid: str
    slot: int
    attempt: int


def child_name(job: PretrainJob) -> str:
    """Return the name of a job's ConfigMap and NetworkPolicy."""
    return f"{job.metadata.name}-{job.metadata.uid[:UID_CHARACTERS]}"


def pod_name(job: PretrainJob, slot: int, attempt: int) -> str:
    """Return the name of a worker's pod; each attempt has its own."""
    return f"{child_name(job)}-{slot}-{attempt}"


def job_labels(job: PretrainJob) -> dict[str, str]:
    """Return the labels of all children."""
    return {JOB_LABEL: job.metadata.name, UID_LABEL: job.metadata.uid}


def worker_labels(job: PretrainJob, slot: int, attempt: int) -> dict[str, str]:
    """Return the labels of a worker's pod."""
    return {**job_labels(job), SLOT_LABEL: str(slot), ATTEMPT_LABEL: str(attempt)}


def owner_reference(job: PretrainJob) -> Object:
    """Return the owner reference for garbage collection; it does not block deletion of the job."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": job.metadata.name,
        "uid": job.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def owner_uid(child: Object) -> str:
    """Return the uid of the PretrainJob that controls an object; empty: none."""
    for reference in cast(list[Object], child["metadata"].get("ownerReferences") or ()):
        if reference.get("controller") and reference["kind"] == KIND and reference["apiVersion"] == API_VERSION:
            return reference["uid"]
    return ""


def worker_pod(pod: Object) -> WorkerPod | None:
    """Return the worker that a pod is; None unless owner and labels agree."""
    uid = owner_uid(pod)
    labels = cast(dict[str, str], pod["metadata"].get("labels") or {})
    slot, attempt = labels.get(SLOT_LABEL, ""), labels.get(ATTEMPT_LABEL, "")
    if not uid or labels.get(UID_LABEL) != uid or not _is_number(slot) or not _is_number(attempt):
        return None
    return WorkerPod(uid, int(slot), int(attempt))


def index_by_job(pod: Object) -> tuple[str, ...]:
    """Return the index value of a worker's pod: the uid of its job."""
    worker = worker_pod(pod)
    return (worker.job_uid,) if worker is not None else ()


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
