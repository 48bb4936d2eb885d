"""Settings of worker pods that come from the operator's installation."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1024**3


@dataclass(frozen=True)
class PodSettings:
    """Settings of the worker pods of all jobs."""

    coordinator_url: str
    """Address for agents: `wss://host:port`, without a path."""
    audience: str
    """Audience of the agents' tokens."""
    ca: str = ""
    """PEM of the CA of the coordinator's certificate; empty: the CAs in the image."""
    default_image: str = ""
    """Replacement of the default of `spec.workers.image`; empty: that default."""
    allowed_service_accounts: tuple[str, ...] = ("default",)
    """Values that a template may use as `serviceAccountName`."""
    cache_bytes: int = 20 * GIB
    """Size limit of the cache volume: above it the kubelet evicts the pod."""
