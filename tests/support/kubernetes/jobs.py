"""What tests of jobs on Kubernetes are built from: jobs as the API server sends them, and settings."""

from __future__ import annotations

import copy
from typing import Any

from pretrain_operator.kubernetes.workload.settings import PodSettings
from pretrain_operator.kubernetes.workload.validation import parse_job

Object = dict[str, Any]
NOON = 1_800_000_000.0
UID = "0a1b2c3d-0000-4000-8000-000000000000"
SETTINGS = PodSettings(coordinator_url="wss://coordinator.system.svc:8443", audience="pretrain", ca="the authority\n")
SPEC: Object = {
    "workers": {"replicas": 3},
    "training": {
        "model": {"preset": "gpt2-tiny"},
        "data": {
            "tokenizer": "s3://corpus/tokenizer.json",
            "sources": [{"name": "web", "uri": "s3://corpus/web"}],
        },
        "steps": 100,
    },
    "checkpoint": {"storage": {"s3": {"bucket": "runs", "prefix": "gpt2", "credentialsSecret": "s3-credentials"}}},
}


def a_job_body(
    *, template: Object | None = None, workers: Object | None = None, name: str = "gpt2", **spec: Object
) -> Object:
    """A PretrainJob as a user writes it, with parts of its spec replaced."""
    body = {
        "apiVersion": "pretrain.dev/v1alpha1",
        "kind": "PretrainJob",
        "metadata": {"name": name},
        "spec": copy.deepcopy(SPEC | spec),
    }
    body["spec"]["workers"] |= (workers or {}) | ({"template": template} if template is not None else {})
    return body


def a_created_job(namespace: str = "team", **parts: Any) -> Object:
    """The same after the API server has taken it in."""
    body = a_job_body(**parts)
    body["metadata"] |= {"namespace": namespace, "uid": UID, "generation": 1, "resourceVersion": "100"}
    return body


def a_parsed_job(**parts: Any) -> Any:
    """The same as the operator has it, which must find nothing wrong."""
    return parse_job(a_created_job(**parts), SETTINGS)
