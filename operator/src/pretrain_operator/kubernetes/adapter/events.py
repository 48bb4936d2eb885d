"""Events on a job, as `kubectl describe` shows them. Pure."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

from pretrain_api.spec.job import API_VERSION, KIND, PretrainJob
from pretrain_operator.cluster import Event
from pretrain_operator.kubernetes.client.api import EVENTS, Object

COMPONENT = "pretrain-operator"
WINDOW_SECONDS = 600
"""An event that comes again within the same ten minutes is counted, not repeated."""
MAX_MESSAGE = 1024


def event_object(job: PretrainJob, event: Event, now: float) -> Object:
    """The Event. The same said again within the window has the same name, whichever replica says it."""
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


def said_again(before: Object, now: float) -> Object:
    """Merge patch for an Event that was said before."""
    return {"count": int(before.get("count") or 1) + 1, "lastTimestamp": timestamp(now)}


def timestamp(now: float) -> str:
    """A time as Kubernetes writes it."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _digest(uid: str, event: Event, now: float) -> str:
    said = "\0".join((uid, event.type, event.reason, event.message, str(int(now // WINDOW_SECONDS))))
    return hashlib.sha256(said.encode()).hexdigest()[:16]
