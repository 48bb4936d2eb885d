"""Configuration of the training program: one JSON file for the whole job."""

from __future__ import annotations

from enum import IntEnum

from pydantic import Field

from pretrain_api.base import Frozen
from pretrain_api.spec.job import Checkpoint, Divergence, PretrainJob
from pretrain_api.spec.training import Training


class ExitCode(IntEnum):
    """Exit codes of the training program that the operator interprets. Any other code is an unknown failure."""

    DONE = 0
    FAILED = 1
    INVALID = 2
    """Invalid input: the user must fix it; a restart does not help."""
    OUT_OF_MEMORY = 70
    CHECKPOINT_REJECTED = 71
    """The latest checkpoint is corrupt: a new generation restores an earlier one."""
    NUMBER_TAKEN = 72
    SUPERSEDED = 73
    """Another job took over the prefix."""
    NO_USABLE_CHECKPOINT = 74
    """Checkpoints exist but none is usable: fail rather than start from step 0."""
    COLLECTIVE = 75
    """A peer was lost during a collective."""
    DIVERGED = 76
    """The loss diverged more often than `maxRollbacks` allows."""


class Cache(Frozen):
    """Cache for shards of sources in S3. Sources in folders are read in place."""

    path: str | None = Field(
        default=None, description="Folder shared by all ranks of a host; absent: `pretrain` in the user's cache"
    )
    bytes: int = Field(default=10 << 30, ge=1, description="Maximum size of the cache; the largest shard must fit")


class TrainerConfig(Frozen):
    """Resolved configuration: URIs are absolute paths or s3:// URIs, `checkpoint.storage.path` is absolute."""

    job_name: str
    job_uid: str
    training: Training
    checkpoint: Checkpoint
    divergence: Divergence = Divergence()
    cache: Cache = Cache()
    threads: int = Field(
        default=1, ge=1, description="CPU threads of each process: fixed, since it changes numerical results"
    )
    nan_steps: tuple[int, ...] = Field(
        default=(), description="Steps of data whose loss is set to NaN (fault injection)"
    )


def trainer_config(
    job: PretrainJob, job_uid: str, *, threads: int = 1, cache: Cache | None = None, nan_steps: tuple[int, ...] = ()
) -> TrainerConfig:
    """Build the training program's configuration of a resolved job."""
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
