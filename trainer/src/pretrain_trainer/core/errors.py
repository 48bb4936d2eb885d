"""The trainer's errors: each says what the caller, the operator or the user should do.

```
TrainerError
├── InvalidInput             the user mends the job or its data; a restart cannot help
├── CollectiveFailed         a peer went away: a new generation goes on
├── CheckpointRejectedError  the newest checkpoint is corrupt: a new generation names an older one
├── NumberTakenError         the lineage has this generation's number: a higher one is needed
├── SupersededError          another job took over the prefix: stop
├── NoUsableCheckpointError  checkpoints exist and none can be used: stop
├── Diverged                 the loss diverged more often than the job allows: stop
├── FinalSaveFailed          the last checkpoint could not be written: try again
└── Obstacle                 somebody mends it outside: the ranks wait (see `waiting`) and go on by themselves
    ├── StorageUnavailable   the store, or the cache's folder, does not do what it should
    ├── BucketMissing        there is no such bucket
    ├── AccessDenied         credentials are refused, or do not allow what is needed
    ├── DataMissing          an object of a source is not there
    ├── DataCorrupt          an object of a source is not what it should be
    └── DataDelayed          nothing is wrong but the time it takes
```
"""

from __future__ import annotations

from pretrain_api.messages.trainer_config import ExitCode


class TrainerError(Exception):
    """An end of the training program that the operator knows by its exit code and reason."""

    exit_code: ExitCode = ExitCode.FAILED
    retryable: bool = True

    @property
    def reason(self) -> str:
        """CamelCase, for conditions."""
        return type(self).__name__.removesuffix("Error")


class InvalidInput(TrainerError):
    """The job or its data cannot be used: one sentence that names the field and the remedy."""

    exit_code = ExitCode.INVALID
    retryable = False


class CollectiveFailed(TrainerError):
    """A collective operation did not complete because a peer or the network went away."""

    exit_code = ExitCode.COLLECTIVE

    @property
    def reason(self) -> str:
        """The reason by which the coordinator knows it."""
        return "CollectiveError"


class CheckpointRejectedError(TrainerError):
    """The checkpoint of manifest `key` is corrupt. Raised on all ranks together, before anything was loaded."""

    exit_code = ExitCode.CHECKPOINT_REJECTED

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"checkpoint {key} was rejected: {message}")
        self.key = key
        self.message = message


class NumberTakenError(TrainerError):
    """The generation's number is in the lineage already; `highest` is the highest number found there."""

    exit_code = ExitCode.NUMBER_TAKEN

    def __init__(self, highest: int) -> None:
        super().__init__(f"the generation's number is taken; the highest in the lineage is {highest}")
        self.highest = highest


class SupersededError(TrainerError):
    """Another job took over the prefix: this one stops."""

    exit_code = ExitCode.SUPERSEDED
    retryable = False


class NoUsableCheckpointError(TrainerError):
    """Checkpoints exist and none can be used: stop, for fear of starting from nothing."""

    exit_code = ExitCode.NO_USABLE_CHECKPOINT
    retryable = False


class Diverged(TrainerError):
    """The loss diverged, and all that the job allows to be done about it was done. Raised on all ranks together."""

    exit_code = ExitCode.DIVERGED
    retryable = False


class FinalSaveFailed(TrainerError):
    """The checkpoint of the last step could not be written, although tried more than once."""


class Obstacle(TrainerError):
    """Something outside keeps this rank from going on: one sentence that says what, and the remedy.

    Its reason is the name of its class. Where nobody waits for it to be mended, the process ends and is started again.
    """


class StorageUnavailable(Obstacle):
    """The storage does not answer, or cannot serve now."""


class BucketMissing(Obstacle):
    """There is no such bucket."""


class AccessDenied(Obstacle):
    """The credentials are missing, refused, or do not allow what is needed."""


class DataMissing(Obstacle):
    """An object of a source is not there."""


class DataCorrupt(Obstacle):
    """An object of a source is not what its description says, or is no description."""


class DataDelayed(Obstacle):
    """Data is on its way and takes long: said so that nobody takes the silence for a hang."""
