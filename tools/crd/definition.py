"""CustomResourceDefinition of PretrainJob, generated from the models."""

from __future__ import annotations

from typing import Any

from pretrain_api.spec.job import API_VERSION, KIND, PretrainJob, PretrainJobSpec
from pretrain_api.status.job import JobStatus
from tools.crd.cel_rules import ROOT_RULES
from tools.crd.structural import structural_spec, structural_status

GROUP, VERSION = API_VERSION.split("/")
PLURAL = "pretrainjobs"
_COLUMNS = (
    ("Phase", "string", ".status.phase", "Phase of the job"),
    ("Step", "integer", ".status.step", "Completed optimizer updates"),
    ("Loss", "number", ".status.loss", "Training loss of the last step, nats per token"),
    ("Tokens/s", "number", ".status.tokensPerSecond", "Tokens per second of the last step"),
    ("Workers", "integer", ".status.replicas", "Workers that exist"),
    ("Generation", "integer", ".status.generation", "Number of the current generation"),
    ("Goodput", "number", ".status.goodput.ratio", "Training time over total time"),
    ("Age", "date", ".metadata.creationTimestamp", "Time since the job was created"),
)
_WIDE_COLUMNS = (
    ("MFU", "number", ".status.mfu", "Model FLOPs over the devices' peak"),
    ("ETA", "string", ".status.eta", "Expected time of the last step"),
)


def custom_resource_definition() -> dict[str, Any]:
    """Build the whole object, ready to be written as YAML or applied."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["ptj"],
            },
            "versions": [_version()],
        },
    }


def _version() -> dict[str, Any]:
    return {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.workers.replicas",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.selector",
            },
        },
        "additionalPrinterColumns": [
            {"name": name, "type": kind, "jsonPath": path, "description": description}
            for name, kind, path, description in _COLUMNS
        ]
        + [
            {"name": name, "type": kind, "jsonPath": path, "description": description, "priority": 1}
            for name, kind, path, description in _WIDE_COLUMNS
        ],
        "schema": {"openAPIV3Schema": _schema()},
    }


def _schema() -> dict[str, Any]:
    return {
        "description": PretrainJob.__doc__,
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": structural_spec(PretrainJobSpec),
            "status": structural_status(JobStatus),
        },
        "x-kubernetes-validations": [rule._asdict() for rule in ROOT_RULES],
    }
