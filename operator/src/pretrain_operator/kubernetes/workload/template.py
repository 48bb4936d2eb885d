"""Parser of `spec.workers.template`, with all of its problems.

The operator's fields are added on top of the template. Refused are fields that would break a worker: command, image
(`spec.workers.image` names it), restart policy, node name, names reserved for the operator.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from pretrain_operator.kubernetes.client.api import Object
from pretrain_operator.kubernetes.workload.names import LABEL_PREFIX
from pretrain_operator.kubernetes.workload.pods import WORKER

AT = "spec.workers.template"
GPU = "nvidia.com/gpu"
MAX_GPUS = 999
THREADS_VARIABLE = "OMP_NUM_THREADS"
OWN_VOLUMES = "pretrain-"
"""Prefix of the operator's volumes."""
CONFIG_DIR, TOKEN_DIR = "/etc/pretrain", "/var/run/secrets/pretrain"
METRICS_PORT_NAME = "metrics"
_OWN_VARIABLES = re.compile(
    r"(PRETRAIN|PET|TORCHELASTIC)_.*|MASTER_(ADDR|PORT)|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|"
    r"GROUP_WORLD_SIZE|POD_IP|NODE_NAME"
)
_MAX_THREADS = 1024


@dataclass(frozen=True)
class Template:
    """Parts of a template, each of the type that Kubernetes wants; the others are dropped and in `problems`."""

    labels: Object
    annotations: Object
    pod: Object
    """The pod's spec without its containers."""
    worker: Object
    """The worker's container."""
    others: tuple[Object, ...]
    """Sidecars."""
    threads: int
    """CPU threads of each training process."""
    gpus: int
    """GPUs of the worker's container."""
    problems: tuple[str, ...]
    """Errors for the user; with any of them no pod can be created."""


def read_template(written: Object) -> Template:
    """Return the parts of `spec.workers.template` and its problems."""
    reader = _Reader()
    metadata, spec = reader.mapping(written, "metadata", AT), reader.mapping(written, "spec", AT)
    containers = reader.mappings(spec, "containers", f"{AT}.spec")
    index = _worker_index(containers)
    worker = containers[index] if index is not None else {}
    at_worker = f"{AT}.spec.containers[{index or 0}]"
    reader.problems += [f"{AT}.{name} is unknown: remove it" for name in written.keys() - {"metadata", "spec"}]
    labels = reader.mapping(metadata, "labels", f"{AT}.metadata")
    reader.problems += _metadata_problems(metadata, labels)
    pod = reader.with_shape({key: value for key, value in spec.items() if key != "containers"}, _POD, f"{AT}.spec")
    reader.problems += _pod_problems(pod)
    worker = reader.with_shape(worker, _CONTAINER, at_worker)
    reader.problems += _worker_problems(worker, at_worker)
    return Template(
        labels=labels,
        annotations=reader.mapping(metadata, "annotations", f"{AT}.metadata"),
        pod=pod,
        worker=worker,
        others=tuple(item for place, item in enumerate(containers) if place != index),
        threads=reader.threads(worker, at_worker),
        gpus=reader.gpus(worker, at_worker),
        problems=tuple(reader.problems),
    )


_POD: dict[str, Any] = {
    "securityContext": {},
    "volumes": [{}],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": [{}]}]},
            "preferredDuringSchedulingIgnoredDuringExecution": [{}],
        }
    },
    "terminationGracePeriodSeconds": 0,
}
_CONTAINER: dict[str, Any] = {
    "env": [{}],
    "ports": [{}],
    "volumeMounts": [{}],
    "securityContext": {},
    "resources": {"limits": {}, "requests": {}},
}
"""Shapes of the fields that the operator merges with; the API server checks the rest."""


class _Reader:
    """Reader of plain data that collects type errors."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def mapping(self, parent: Object, key: str, at: str) -> Object:
        """Return a mapping; empty if absent, null or of another type."""
        value = parent.get(key)
        if value is None or isinstance(value, dict):
            return cast(Object, value or {})
        self.problems.append(f"{at}.{key} must be a mapping (`key: value` lines)")
        return {}

    def mappings(self, parent: Object, key: str, at: str) -> list[Object]:
        """Return a list of mappings; empty if absent, null or of another type."""
        value = parent.get(key)
        if value is None:
            return []
        items = cast(list[Any], value) if isinstance(value, list) else [None]
        if all(isinstance(item, dict) for item in items):
            return cast(list[Object], items)
        self.problems.append(f"{at}.{key} must be a list of mappings (`- key: value` lines)")
        return []

    def with_shape(self, written: Object, shape: Object, at: str) -> Object:
        """Return the mapping with the parts of the shape checked, and those of another type dropped."""
        result = {key: value for key, value in written.items() if value is not None}
        for key in shape.keys() & result.keys():
            match shape[key]:
                case dict():
                    result[key] = self.with_shape(self.mapping(written, key, at), shape[key], f"{at}.{key}")
                case list():
                    items = self.mappings(written, key, at)
                    inner = cast(Object, shape[key][0])
                    result[key] = [
                        self.with_shape(item, inner, f"{at}.{key}[{place}]") for place, item in enumerate(items)
                    ]
                case _ if not _is_whole(result[key]):
                    self.problems.append(f"{at}.{key} must be a whole number of at least 0")
                    del result[key]
                case _:
                    pass
        return result

    def threads(self, worker: Object, at: str) -> int:
        """Return the value of the threads' variable, else 1. The number of threads changes bits of the results."""
        for place, variable in enumerate(worker.get("env", ())):
            if variable.get("name") == THREADS_VARIABLE:
                value = variable.get("value")
                if isinstance(value, str) and re.fullmatch(r"[1-9][0-9]{0,3}", value) and int(value) <= _MAX_THREADS:
                    return int(value)
                self.problems.append(
                    f"{at}.env[{place}].value of {THREADS_VARIABLE} must be a number from 1 to {_MAX_THREADS} in quotes"
                )
        return 1

    def gpus(self, worker: Object, at: str) -> int:
        """Return the GPU limit of the container."""
        value = worker.get("resources", {}).get("limits", {}).get(GPU, 0)
        valid = value <= MAX_GPUS if _is_whole(value) else isinstance(value, str) and re.fullmatch(r"[0-9]{1,3}", value)
        if not valid:
            self.problems.append(f"{at}.resources.limits.{GPU} must be a whole number of GPUs, at most {MAX_GPUS}")
            return 0
        return int(value)


def _worker_index(containers: list[Object]) -> int | None:
    """Return the index of the worker's container: the one of that name, else the first without name or image."""
    named = (place for place, item in enumerate(containers) if item.get("name") == WORKER)
    partial = (place for place, item in enumerate(containers) if not (item.get("name") and item.get("image")))
    return next(named, next(partial, None))


def _metadata_problems(metadata: Object, labels: Object) -> Iterator[str]:
    for name in metadata.keys() - {"labels", "annotations", "creationTimestamp"}:
        yield f"{AT}.metadata.{name} cannot be used: only labels and annotations are supported; remove it"
    for label in labels:
        if label.startswith(LABEL_PREFIX):
            yield f"{AT}.metadata.labels.{label} is reserved for the operator: use another prefix"


def _pod_problems(pod: Object) -> Iterator[str]:
    at = f"{AT}.spec"
    if pod.get("restartPolicy", "Never") != "Never":
        yield f"{at}.restartPolicy must be Never: the operator replaces failed workers; remove it"
    if pod.get("nodeName"):
        yield f"{at}.nodeName would pin every worker to one node, even a dead one: use nodeSelector or affinity"
    if pod.get("serviceAccount"):
        yield f"{at}.serviceAccount is deprecated: use serviceAccountName"
    for place, volume in enumerate(pod.get("volumes", ())):
        if str(volume.get("name", "")).startswith(OWN_VOLUMES):
            yield f"{at}.volumes[{place}].name begins with {OWN_VOLUMES}, reserved for the operator: use another name"


def _worker_problems(worker: Object, at: str) -> Iterator[str]:
    for field in ("command", "args"):
        if worker.get(field):
            yield f"{at}.{field} is the agent's command line: remove it"
    if worker.get("image"):
        yield f"{at}.image is not used: set spec.workers.image"
    if worker.get("restartPolicy"):
        yield f"{at}.restartPolicy cannot be used: the operator replaces failed workers; remove it"
    for place, variable in enumerate(worker.get("env", ())):
        name = str(variable.get("name", ""))
        if _OWN_VARIABLES.fullmatch(name):
            yield f"{at}.env[{place}]: {name} is set by the operator or torchrun: remove it"
    for place, mount in enumerate(worker.get("volumeMounts", ())):
        if str(mount.get("mountPath", "")).rstrip("/") in (CONFIG_DIR, TOKEN_DIR):
            yield f"{at}.volumeMounts[{place}].mountPath is reserved for the operator: mount it elsewhere"
    for place, port in enumerate(worker.get("ports", ())):
        if port.get("name") == METRICS_PORT_NAME:
            yield f"{at}.ports[{place}].name {METRICS_PORT_NAME} is reserved for the agent: use another name"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
