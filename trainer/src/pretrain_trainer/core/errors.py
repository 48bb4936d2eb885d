"""The trainer's errors, by the action that they ask for.

```
TrainerError
├── InvalidInput             the user fixes the job or its data; a restart cannot help
├── CollectiveFailed         a peer is gone: a new generation resumes
├── CheckpointRejectedError  the latest checkpoint is corrupt: a new generation resumes from an older one
├── NumberTakenError         the lineage already has this generation's number: take a higher one
├── SupersededError          another job took over the prefix: stop
├── NoUsableCheckpointError  checkpoints exist and none is usable: stop
├── DivergedError            the loss diverged more often than the job allows: stop
├── FinalSaveFailed          the last checkpoint could not be written: retry
└── ObstacleError            fixed outside the job: the ranks wait (see `waits`) and resume by themselves
    ├── StorageUnavailable   the store, or the folder of the cache, does not work
    ├── BucketMissingError   the bucket does not exist
    ├── AccessDeniedError    the credentials are refused, or lack a permission
    ├── DataMissing          an object of a source does not exist
    ├── DataCorrupt          an object of a source differs from its description
    └── DataDelayed          fetching takes long; nothing is wrong
```
"""

from __future__ import annotations

from pretrain_api.messages.trainer_config import ExitCode


class TrainerError(Exception):
    """A failure of the training program that the operator recognises by exit code and reason."""

    exit_code: ExitCode = ExitCode.FAILED
    retryable: bool = True

    @property
    def reason(self) -> str:
        """The CamelCase reason of conditions: the name of the class without `Error`."""
        return type(self).__name__.removesuffix("Error")


class InvalidInput(TrainerError):
    """The job or its data is invalid. The message is one sentence that names the field and the remedy."""

    exit_code = ExitCode.INVALID
    retryable = False


class CollectiveFailed(TrainerError):
    """A collective operation failed because a peer or the network is gone."""

    exit_code = ExitCode.COLLECTIVE

    @property
    def reason(self) -> str:
        """The reason that the coordinator recognises."""
        return "CollectiveError"


class CheckpointRejectedError(TrainerError):
    """The checkpoint of manifest `key` is corrupt. Raised on all ranks, before anything is loaded."""

    exit_code = ExitCode.CHECKPOINT_REJECTED

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"checkpoint {key} was rejected: {message}")
        self.key = key
        self.message = message


class NumberTakenError(TrainerError):
    """The lineage already has this generation's number; `highest` is the highest number in it."""

    exit_code = ExitCode.NUMBER_TAKEN

    def __init__(self, highest: int) -> None:
        super().__init__(f"the generation's number is taken; the highest in the lineage is {highest}")
        self.highest = highest


class SupersededError(TrainerError):
    """Another job took over the prefix; this one stops."""

    exit_code = ExitCode.SUPERSEDED
    retryable = False


class NoUsableCheckpointError(TrainerError):
    """Checkpoints exist and none is usable. The job stops instead of starting from step 0."""

    exit_code = ExitCode.NO_USABLE_CHECKPOINT
    retryable = False


class DivergedError(TrainerError):
    """The loss diverged and the job's allowance of remedies is used up. Raised on all ranks."""

    exit_code = ExitCode.DIVERGED
    retryable = False


class FinalSaveFailed(TrainerError):
    """The checkpoint of the last step could not be written in several attempts."""


class ObstacleError(TrainerError):
    """A condition outside the job that blocks this rank. The message is one sentence with the remedy.

    The reason is the name of the class without `Error`. A caller that does not wait lets the process fail and restart.
    """


class StorageUnavailable(ObstacleError):
    """The storage does not answer, or cannot serve now."""


class BucketMissingError(ObstacleError):
    """The bucket does not exist."""


class AccessDeniedError(ObstacleError):
    """The credentials are missing, refused, or lack a permission."""


class DataMissing(ObstacleError):
    """An object of a source does not exist."""


class DataCorrupt(ObstacleError):
    """An object of a source differs from its description, or the description is invalid."""


class DataDelayed(ObstacleError):
    """Data is being fetched and takes long. Reported so that the silence is not taken for a hang."""
