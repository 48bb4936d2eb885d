"""The objects that belong to a job: its workers' pods, their configuration, who may reach them. Pure.

A pod is what the user's template says, and on top of it, winning where both speak:
  - name, labels `pretrain.dev/…`, owner, `restartPolicy: Never`, no token of the service account for the API server;
  - the container `worker` with the agent's command line, the image, the named port `metrics`;
  - the volumes `pretrain-…`, and in the environment credentials from the job's Secret;
  - a grace period that suffices for a checkpoint, and the nodes where it must not or should not run.
Defaults, which give way to what the template says: restricted pod security, spread over nodes, `/tmp`, `/dev/shm` and
the cache as volumes of their own, one thread, programs' caches under `/tmp`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

from pretrain_api.messages.trainer_config import Cache, trainer_config
from pretrain_api.spec.job import PretrainJob
from pretrain_operator.cluster import Placement
from pretrain_operator.kubernetes.client.api import CONFIG_MAPS, NETWORK_POLICIES, PODS, Object
from pretrain_operator.kubernetes.workload.container import (
    CA,
    CACHE_DIR,
    METRICS_PORT,
    TRAINER_CONFIG,
    Identity,
    volumes,
    worker_container,
)
from pretrain_operator.kubernetes.workload.names import (
    UID_LABEL,
    child_name,
    job_labels,
    owner_reference,
    pod_name,
    worker_labels,
)
from pretrain_operator.kubernetes.workload.settings import PodSettings
from pretrain_operator.kubernetes.workload.template import Template, read_template

GRACE_MARGIN_SECONDS = 5
"""Between the agent's own end after its grace and the kubelet's SIGKILL."""
CACHE_SHARE = 0.9
"""Of the cache's volume that is filled: above the volume's limit the kubelet evicts the pod."""
USER_ID = 65532
"""`nonroot` in the images."""


def pod(job: PretrainJob, slot: int, attempt: int, placement: Placement, settings: PodSettings) -> Object:
    """The pod of one attempt of a worker. The job has no `problems`."""
    template = read_template(job.spec.workers.template)
    worker = worker_container(job, Identity(slot, attempt, placement.grace_seconds), template, settings)
    own = template.pod
    return {
        "apiVersion": PODS.api_version,
        "kind": "Pod",
        "metadata": {
            "name": pod_name(job, slot, attempt),
            "namespace": job.metadata.namespace,
            "labels": {**template.labels, **worker_labels(job, slot, attempt)},
            "annotations": template.annotations,
            "ownerReferences": [owner_reference(job)],
        },
        "spec": {
            "serviceAccountName": "default",
            "enableServiceLinks": False,
            "topologySpreadConstraints": [_spread(job)],
            **own,
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": _grace(template, placement),
            "affinity": _affinity(own.get("affinity", {}), placement),
            "securityContext": {**_RESTRICTED, **own.get("securityContext", {})},
            "containers": [worker, *template.others],
            "volumes": [*own.get("volumes", ()), *volumes(job, template, settings)],
        },
    }


def config_map(job: PretrainJob, settings: PodSettings) -> Object:
    """What the training program is started with, the same for all workers from the first to the last: immutable."""
    threads = read_template(job.spec.workers.template).threads
    cache = Cache(path=CACHE_DIR, bytes=int(CACHE_SHARE * settings.cache_bytes))
    data = {TRAINER_CONFIG: trainer_config(job, job.metadata.uid, threads=threads, cache=cache).to_json() + "\n"}
    if settings.ca:
        data[CA] = settings.ca
    return {
        "apiVersion": CONFIG_MAPS.api_version,
        "kind": "ConfigMap",
        "metadata": _child_metadata(job),
        "immutable": True,
        "data": data,
    }


def network_policy(job: PretrainJob) -> Object:
    """Workers are reached by workers of the same job, and their metrics by anybody: what joins them has no lock."""
    workers = {"matchLabels": {UID_LABEL: job.metadata.uid}}
    return {
        "apiVersion": NETWORK_POLICIES.api_version,
        "kind": "NetworkPolicy",
        "metadata": _child_metadata(job),
        "spec": {
            "podSelector": workers,
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": workers}]},
                {"ports": [{"protocol": "TCP", "port": METRICS_PORT}]},
            ],
        },
    }


_RESTRICTED: Object = {
    "runAsNonRoot": True,
    "runAsUser": USER_ID,
    "runAsGroup": USER_ID,
    "fsGroup": USER_ID,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}


def _child_metadata(job: PretrainJob) -> Object:
    return {
        "name": child_name(job),
        "namespace": job.metadata.namespace,
        "labels": job_labels(job),
        "ownerReferences": [owner_reference(job)],
    }


def _grace(template: Template, placement: Placement) -> int:
    own = template.pod.get("terminationGracePeriodSeconds", 0)
    return max(own, math.ceil(placement.grace_seconds) + GRACE_MARGIN_SECONDS)


def _spread(job: PretrainJob) -> Object:
    """One node's loss should be one worker's."""
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {UID_LABEL: job.metadata.uid}},
    }


def _affinity(own: Object, placement: Placement) -> Object:
    """The user's affinity, less the nodes to be shunned. By the nodes' names, since a hostname may be another."""
    if not placement.never and not placement.rather_not:
        return own
    node: Object = dict(own.get("nodeAffinity", {}))
    if placement.never:
        terms = node.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", ())
        shunned = _not_on(placement.never)
        node["requiredDuringSchedulingIgnoredDuringExecution"] = {
            "nodeSelectorTerms": [
                {**term, "matchFields": [*term.get("matchFields", ()), *shunned]}
                for term in cast(Iterable[Object], terms or [{}])  # any one of the terms must hold
            ]
        }
    if placement.rather_not:
        preferred = node.get("preferredDuringSchedulingIgnoredDuringExecution", ())
        avoided: Object = {"weight": 100, "preference": {"matchFields": _not_on(placement.rather_not)}}
        node["preferredDuringSchedulingIgnoredDuringExecution"] = [*preferred, avoided]
    return {**own, "nodeAffinity": node}


def _not_on(nodes: frozenset[str]) -> list[Object]:
    """The API server takes one name in each requirement; all of them must hold."""
    return [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in sorted(nodes)]
