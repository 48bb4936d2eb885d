"""Selectors of one job's series."""

from __future__ import annotations

JOB = 'namespace="$namespace",name="$name"'


def of(metric: str, more: str = "") -> str:
    """Query a gauge of the job, once even if two operators expose it during a failover."""
    return f"max without (instance, pod, endpoint, service, container, job) ({metric}{{{JOB}{more}}})"
