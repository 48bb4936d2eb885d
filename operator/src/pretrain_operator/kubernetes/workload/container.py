"""Container of a worker, and its volumes. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pretrain_api.estimate.state_size import memory_checkpoint_bytes, state_bytes
from pretrain_api.spec.job import PretrainJob, Workers
from pretrain_operator.agent_command import agent_arguments
from pretrain_operator.kubernetes.client.api import Object
from pretrain_operator.kubernetes.workload.names import child_name
from pretrain_operator.kubernetes.workload.pods import WORKER
from pretrain_operator.kubernetes.workload.settings import PodSettings
from pretrain_operator.kubernetes.workload.template import (
    CONFIG_DIR,
    METRICS_PORT_NAME,
    THREADS_VARIABLE,
    TOKEN_DIR,
    Template,
)

METRICS_PORT = 9400
TRAINER_CONFIG, CA, TOKEN = "trainer.json", "ca.crt", "token"
TOKEN_SECONDS = 3600
"""Lifetime of the token; the kubelet renews it at 80 %."""
CACHE_DIR = "/var/cache/pretrain"
SHARED_MEMORY_BASE = 256 * 1024**2
"""Bytes per process for queues and NCCL."""
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
SESSION_TOKEN = "AWS_SESSION_TOKEN"
_DEFAULT_IMAGE = Workers().image


class WorkerIdentity(NamedTuple):
    """Slot and attempt of a worker, and its grace period in seconds."""

    slot: int
    attempt: int
    grace_seconds: float


class _Volume(NamedTuple):
    path: str
    source: Object
    required: bool = False
    """Required volumes always stay; others give way to a mount of the template at their path."""


def worker_container(job: PretrainJob, worker: WorkerIdentity, template: Template, settings: PodSettings) -> Object:
    """Return the container that runs the agent."""
    own, mounts = template.worker, _needed(job, template, settings)
    image = job.spec.workers.image
    return {
        "imagePullPolicy": "IfNotPresent",
        "terminationMessagePolicy": "FallbackToLogsOnError",
        **own,
        "name": WORKER,
        "image": settings.default_image if settings.default_image and image == _DEFAULT_IMAGE else image,
        "command": _command(job, worker, template, settings),
        "env": list(_environment(job, template)),
        "ports": [*own.get("ports", ()), {"name": METRICS_PORT_NAME, "containerPort": METRICS_PORT}],
        "volumeMounts": [
            *own.get("volumeMounts", ()),
            *({"name": name, "mountPath": it.path, "readOnly": it.required} for name, it in mounts.items()),
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            **own.get("securityContext", {}),
        },
    }


def volumes(job: PretrainJob, template: Template, settings: PodSettings) -> list[Object]:
    """Return the operator's volumes of the pod."""
    return [{"name": name, **volume.source} for name, volume in _needed(job, template, settings).items()]


def processes(job: PretrainJob, template: Template) -> int:
    """Return the training processes per worker: as specified, else one per GPU, else one."""
    return job.spec.workers.processes_per_worker or template.gpus or 1


def _command(job: PretrainJob, worker: WorkerIdentity, template: Template, settings: PodSettings) -> list[str]:
    options: dict[str, object] = {
        "--coordinator": f"{settings.coordinator_url}/v1/jobs/{job.metadata.uid}/agents",
        "--job-uid": job.metadata.uid,
        "--slot": worker.slot,
        "--attempt": worker.attempt,
        "--host": "$(POD_IP)",
        "--node": "$(NODE_NAME)",
        "--processes": processes(job, template),
        "--http-port": METRICS_PORT,
        "--grace": f"{worker.grace_seconds:g}",
        "--token-file": f"{TOKEN_DIR}/{TOKEN}",
    }
    if settings.ca:
        options["--ca-file"] = f"{CONFIG_DIR}/{CA}"
    program = ["-m", "pretrain_trainer", f"{CONFIG_DIR}/{TRAINER_CONFIG}"]
    return ["pretrain-agent", *agent_arguments(options, job.spec), "--", *program]


def _environment(job: PretrainJob, template: Template) -> Iterator[Object]:
    """Yield variables in order: those that others may refer to, credentials, the user's, unset defaults."""
    yield {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    yield {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}
    from_secret = dict(_credentials(job))
    own = [variable for variable in template.worker.get("env", ()) if _name(variable) not in from_secret]
    yield from ({"name": name, "valueFrom": {"secretKeyRef": key}} for name, key in from_secret.items())
    yield from own
    defaults = {
        "HOME": "/tmp",
        "XDG_CACHE_HOME": "/tmp/.cache",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor",
        "TRITON_CACHE_DIR": "/tmp/triton",
        THREADS_VARIABLE: str(template.threads),
    }
    given = {_name(variable) for variable in own}
    yield from ({"name": name, "value": value} for name, value in defaults.items() if name not in given)


def _name(variable: Object) -> str:
    """Return the name of an environment variable; the API server refuses names that are not strings."""
    return str(variable.get("name", ""))


def _credentials(job: PretrainJob) -> Iterator[tuple[str, Object]]:
    """Yield references into the job's Secret. A missing key keeps the container from starting, shown in the pod."""
    s3 = job.spec.checkpoint.storage.s3
    if s3 is None or not s3.credentials_secret:
        return
    for name in CREDENTIALS:
        yield name, {"name": s3.credentials_secret, "key": name, "optional": False}
    yield SESSION_TOKEN, {"name": s3.credentials_secret, "key": SESSION_TOKEN, "optional": True}


def _needed(job: PretrainJob, template: Template, settings: PodSettings) -> dict[str, _Volume]:
    """Return the operator's volumes by name, without those replaced by a mount of the template."""
    token = {"audience": settings.audience, "expirationSeconds": TOKEN_SECONDS, "path": TOKEN}
    shared = shared_memory(job, processes(job, template))
    every = {
        "pretrain-config": _Volume(CONFIG_DIR, {"configMap": {"name": child_name(job)}}, required=True),
        "pretrain-token": _Volume(
            TOKEN_DIR, {"projected": {"sources": [{"serviceAccountToken": token}]}}, required=True
        ),
        "pretrain-tmp": _Volume("/tmp", {"emptyDir": {}}),
        "pretrain-shm": _Volume("/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": str(shared)}}),
        "pretrain-cache": _Volume(CACHE_DIR, {"emptyDir": {"sizeLimit": str(settings.cache_bytes)}}),
    }
    mounted = {str(mount.get("mountPath", "")).rstrip("/") for mount in template.worker.get("volumeMounts", ())}
    return {name: volume for name, volume in every.items() if volume.required or volume.path not in mounted}


def shared_memory(job: PretrainJob, count: int) -> int:
    """Return bytes of shared memory: twice the state for checkpoint staging, and the snapshots of
    `checkpoint.memory`.
    """
    return count * SHARED_MEMORY_BASE + 2 * state_bytes(job.spec) + memory_checkpoint_bytes(job.spec, processes=count)
