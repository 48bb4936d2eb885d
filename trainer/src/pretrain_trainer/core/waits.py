"""Which errors of a store are worth waiting for."""

from __future__ import annotations

from pretrain_store import errors as store
from pretrain_trainer.core.errors import AccessDenied, BucketMissing, InvalidInput, Obstacle, StorageUnavailable

_ITSELF = "training goes on by itself"


def in_the_way(error: store.StoreError) -> Obstacle | None:
    """The obstacle that an error of a store is; None for what waiting does not mend."""
    cause = error.__cause__
    plain = cause if isinstance(cause, store.StoreError) else error  # without a remedy of its own
    match plain:
        case store.NoSuchBucket():
            return BucketMissing(f"{plain}: create the bucket; {_ITSELF} when it is there")
        case store.CredentialsRejected():
            return AccessDenied(f"{plain}: allow these credentials what is needed, or correct them; {_ITSELF} then")
        case store.StoreUnavailable():
            return StorageUnavailable(f"{plain}: check the service and the way to it; {_ITSELF} when it answers")
        case _:
            return None


def of_field(error: store.StoreError, field: str) -> Obstacle | InvalidInput:
    """What an error of a store means that `field` of the job names."""
    obstacle = in_the_way(error)
    return InvalidInput(f"{field}: {error}") if obstacle is None else type(obstacle)(f"{field}: {obstacle}")
