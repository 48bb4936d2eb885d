"""Manifests of a job's children: worker pods, ConfigMap, NetworkPolicy. Pure.

A pod is the user's template with these fields of the operator on top:
  - name, labels `pretrain.dev/…`, owner, `restartPolicy: Never`, no API token of the service account;
  - the container `worker` with the agent's command line, the image, the named port `metrics`;
  - the volumes `pretrain-…`, and credentials from the job's Secret in the environment;
  - a grace period long enough for a checkpoint, and node affinity against quarantined and suspect nodes.
Defaults that the template may override: restricted pod security, spread over nodes, volumes for `/tmp`, `/dev/shm` and
the cache, one thread, program caches under `/tmp`.
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
    WorkerIdentity,
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
"""Time between the end of the agent's grace period and the kubelet's SIGKILL."""
CACHE_SHARE = 0.9
"""Share of the cache volume that is filled: above its limit the kubelet evicts the pod."""
USER_ID = 65532
"""User `pretrain` in the images."""


def pod(job: PretrainJob, slot: int, attempt: int, placement: Placement, settings: PodSettings) -> Object:
    """Return the pod of one attempt of a worker, for a job without `problems`."""
    template = read_template(job.spec.workers.template)
    worker = worker_container(job, WorkerIdentity(slot, attempt, placement.grace_seconds), template, settings)
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
    """Return the trainer's configuration, immutable for the life of the job."""
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
    """Return the policy that admits workers of the same job, and anybody to the metrics: the TCPStore and gloo have no
    authentication."""
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
    """Spread workers, so that the loss of a node is the loss of one worker."""
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {UID_LABEL: job.metadata.uid}},
    }


def _affinity(own: Object, placement: Placement) -> Object:
    """Return the user's affinity without the excluded nodes, matched by node name: the hostname label may differ."""
    if not placement.never and not placement.rather_not:
        return own
    node: Object = dict(own.get("nodeAffinity", {}))
    if placement.never:
        terms = node.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", ())
        shunned = _not_on(placement.never)
        node["requiredDuringSchedulingIgnoredDuringExecution"] = {
            "nodeSelectorTerms": [
                {**term, "matchFields": [*term.get("matchFields", ()), *shunned]}
                for term in cast(Iterable[Object], terms or [{}])  # terms are alternatives
            ]
        }
    if placement.rather_not:
        preferred = node.get("preferredDuringSchedulingIgnoredDuringExecution", ())
        avoided: Object = {"weight": 100, "preference": {"matchFields": _not_on(placement.rather_not)}}
        node["preferredDuringSchedulingIgnoredDuringExecution"] = [*preferred, avoided]
    return {**own, "nodeAffinity": node}


def _not_on(nodes: frozenset[str]) -> list[Object]:
    """Return one requirement per node, since the API server takes one name in each; all must hold."""
    return [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in sorted(nodes)]
