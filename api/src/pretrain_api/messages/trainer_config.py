"""The trainer's configuration: what the training program is started with, one JSON file for the whole job."""

from __future__ import annotations

from enum import IntEnum

from pydantic import Field

from pretrain_api.base import Frozen
from pretrain_api.spec.job import Checkpoint, Divergence, PretrainJob
from pretrain_api.spec.training import Training


class ExitCode(IntEnum):
    """Exit codes of the training program that the operator knows. Anything else is an unknown failure."""

    DONE = 0
    FAILED = 1
    INVALID = 2
    """Bad input: the user mends it; a restart cannot help."""
    OUT_OF_MEMORY = 70
    CHECKPOINT_REJECTED = 71
    """The newest checkpoint is corrupt: a new generation names an older one."""
    NUMBER_TAKEN = 72
    SUPERSEDED = 73
    """Another job took over the prefix: stop."""
    NO_USABLE_CHECKPOINT = 74
    """Checkpoints exist, none can be used: stop, for fear of starting from nothing."""
    COLLECTIVE = 75
    """A peer went away in the middle of a collective."""
    DIVERGED = 76
    """The loss diverged more often than the job allows."""


class Cache(Frozen):
    """Where shards of sources in S3 are kept for as long as there is room; those in folders are read where they are."""

    path: str | None = Field(
        default=None, description="A folder that all ranks of a host share; absent: `pretrain` in the user's cache"
    )
    bytes: int = Field(default=10 << 30, ge=1, description="Most that is kept; the largest shard must fit")


class TrainerConfig(Frozen):
    """Everything is resolved: URIs are absolute paths or s3:// URIs, `checkpoint.storage.path` is absolute."""

    job_name: str
    job_uid: str
    training: Training
    checkpoint: Checkpoint
    divergence: Divergence = Divergence()
    cache: Cache = Cache()
    threads: int = Field(default=1, ge=1, description="CPU threads of each process: pinned, since it changes bits")
    nan_steps: tuple[int, ...] = Field(
        default=(), description="Steps of data whose loss is made NaN: a fault that is injected on purpose"
    )


def trainer_config(
    job: PretrainJob, job_uid: str, *, threads: int = 1, cache: Cache | None = None, nan_steps: tuple[int, ...] = ()
) -> TrainerConfig:
    """What the training program of a resolved job is started with."""
    return TrainerConfig(
        job_name=job.metadata.name,
        job_uid=job_uid,
        training=job.spec.training,
        checkpoint=job.spec.checkpoint,
        divergence=job.spec.recovery.divergence,
        cache=cache or Cache(),
        threads=threads,
        nan_steps=nan_steps,
    )
