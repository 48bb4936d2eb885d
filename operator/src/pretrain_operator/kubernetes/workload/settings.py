"""What the operator's installation says about worker pods."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1024**3


@dataclass(frozen=True)
class PodSettings:
    """The same for all jobs of one operator."""

    coordinator_url: str
    """Where agents connect: `wss://host:port`, without a path."""
    audience: str
    """Of the tokens that agents show to the coordinator."""
    ca: str = ""
    """PEM of the authority that signed the coordinator's certificate; empty: the image's own authorities."""
    default_image: str = ""
    """In the place of `spec.workers.image` where the user left that at its default; empty: that default itself."""
    allowed_service_accounts: tuple[str, ...] = ("default",)
    """What a job's template may name as `serviceAccountName`."""
    cache_bytes: int = 20 * GIB
    """Most that the volume for cached data may hold: above it the kubelet evicts the pod."""
