"""Translation of API errors into errors of the Cluster port."""

from __future__ import annotations

from pretrain_operator.cluster import PodRefused
from pretrain_operator.kubernetes.client.api import ApiError


class Gone(OSError):
    """The job was deleted."""


def refusal(error: ApiError, what: str) -> OSError:
    """Return PodRefused if a person must act, else the error itself, which is retried.

    `what` names the object in a sentence: `worker 3`.
    """
    if error.status == 403 and "exceeded quota" in error.message:
        said = f"{what} cannot be created: {error.message}; raise or free the quota, or lower spec.workers.replicas"
        return PodRefused("QuotaExceeded", said)
    if error.status == 403:
        said = (
            f"{what} cannot be created: {error.message}; fix spec.workers.template, or have the administrator allow it"
        )
        return PodRefused("Forbidden", said)
    if error.status in (400, 422):
        return PodRefused("Invalid", f"{what} cannot be created: {error.message}; fix spec.workers")
    return error
