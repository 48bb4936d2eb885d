"""What the API server's answers mean to whoever wanted something."""

from __future__ import annotations

from pretrain_operator.cluster import Refused
from pretrain_operator.kubernetes.client.api import ApiError


class Gone(OSError):
    """The job no longer exists."""


def refusal(error: ApiError, what: str) -> OSError:
    """The error for the caller: Refused where only a person can help, else what it was, to be tried again.

    `what` was to be created, in the words of a sentence: `worker 3`.
    """
    if error.status == 403 and "exceeded quota" in error.message:
        said = f"{what} cannot be created: {error.message}; raise the quota, free some of it, or want fewer workers"
        return Refused("QuotaExceeded", said)
    if error.status == 403:
        said = f"{what} cannot be created: {error.message}; mend spec.workers.template, or have it allowed"
        return Refused("Forbidden", said)
    if error.status in (400, 422):
        return Refused("Invalid", f"{what} cannot be created: {error.message}; mend spec.workers")
    return error
