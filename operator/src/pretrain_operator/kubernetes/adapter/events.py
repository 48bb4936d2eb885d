"""Kubernetes Events of a job. Pure."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

from pretrain_api.spec.job import API_VERSION, KIND, PretrainJob
from pretrain_operator.cluster import Event
from pretrain_operator.kubernetes.client.api import EVENTS, Object

COMPONENT = "pretrain-operator"
WINDOW_SECONDS = 600
"""Window in which a repeated Event raises the count of the first."""
MAX_MESSAGE = 1024


def event_object(job: PretrainJob, event: Event, now: float) -> Object:
    """Return the Event. Repeats within the window get the same name, from any replica."""
    metadata = job.metadata
    moment = timestamp(now)
    return {
        "apiVersion": EVENTS.api_version,
        "kind": "Event",
        "metadata": {"name": f"{metadata.name}.{_digest(metadata.uid, event, now)}", "namespace": metadata.namespace},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "namespace": metadata.namespace,
            "name": metadata.name,
            "uid": metadata.uid,
        },
        "type": event.type,
        "reason": event.reason,
        "message": event.message if len(event.message) <= MAX_MESSAGE else event.message[: MAX_MESSAGE - 1] + "…",
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "reportingInstance": "",
        "firstTimestamp": moment,
        "lastTimestamp": moment,
        "count": 1,
    }


def repeated(before: Object, now: float) -> Object:
    """Return the merge patch for a repeated Event."""
    return {"count": int(before.get("count") or 1) + 1, "lastTimestamp": timestamp(now)}


def timestamp(now: float) -> str:
    """Return a time in Kubernetes' format."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _digest(uid: str, event: Event, now: float) -> str:
    said = "\0".join((uid, event.type, event.reason, event.message, str(int(now // WINDOW_SECONDS))))
    return hashlib.sha256(said.encode()).hexdigest()[:16]
