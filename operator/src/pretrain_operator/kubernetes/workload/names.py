"""Names, labels and owner references of what belongs to a job: how its children are found, and adopted."""

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
"""Label selector of all worker pods, for an informer."""
UID_CHARACTERS = 5
"""Of the job's uid in names: another job of the same name has other children."""


class WorkerPod(NamedTuple):
    """Which worker a pod is."""

    job_uid: str
    slot: int
    attempt: int


def child_name(job: PretrainJob) -> str:
    """Name of the one config map and the one network policy of a job."""
    return f"{job.metadata.name}-{job.metadata.uid[:UID_CHARACTERS]}"


def pod_name(job: PretrainJob, slot: int, attempt: int) -> str:
    """Name of a worker's pod: another attempt is another pod."""
    return f"{child_name(job)}-{slot}-{attempt}"


def job_labels(job: PretrainJob) -> dict[str, str]:
    """On everything that belongs to the job."""
    return {JOB_LABEL: job.metadata.name, UID_LABEL: job.metadata.uid}


def worker_labels(job: PretrainJob, slot: int, attempt: int) -> dict[str, str]:
    """On a worker's pod."""
    return {**job_labels(job), SLOT_LABEL: str(slot), ATTEMPT_LABEL: str(attempt)}


def owner_reference(job: PretrainJob) -> Object:
    """By which everything goes when the job does. It keeps nobody from deleting the job."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": job.metadata.name,
        "uid": job.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def owner_uid(child: Object) -> str:
    """The uid of the PretrainJob that an object belongs to; empty: it belongs to none."""
    for reference in cast(list[Object], child["metadata"].get("ownerReferences") or ()):
        if reference.get("controller") and reference["kind"] == KIND and reference["apiVersion"] == API_VERSION:
            return reference["uid"]
    return ""


def worker_pod(pod: Object) -> WorkerPod | None:
    """Which worker this pod is; None for a pod that only looks like one: owner and labels must agree."""
    uid = owner_uid(pod)
    labels = cast(dict[str, str], pod["metadata"].get("labels") or {})
    slot, attempt = labels.get(SLOT_LABEL, ""), labels.get(ATTEMPT_LABEL, "")
    if not uid or labels.get(UID_LABEL) != uid or not _is_number(slot) or not _is_number(attempt):
        return None
    return WorkerPod(uid, int(slot), int(attempt))


def index_by_job(pod: Object) -> tuple[str, ...]:
    """The uid of the job whose worker a pod is: the index of the informer of pods."""
    worker = worker_pod(pod)
    return (worker.job_uid,) if worker is not None else ()


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
