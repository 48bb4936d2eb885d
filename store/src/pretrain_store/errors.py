"""Errors of this package, translated once at the edge of each adapter.

```
StoreError                      the store did not do what was asked
├── ObjectNotFound              no object has this key
├── ObjectExists                a conditional put found an object under this key
├── StoreUnavailable            retry: no answer, throttled, a broken connection, a full disk
├── StoreRefused                the user must fix it: a folder that is not writable, half of the credentials
│   ├── NoSuchBucket            the bucket does not exist, and may be created later
│   └── CredentialsRejected     the credentials are rejected or lack permission, and may be allowed later
└── ConditionalPutUnsupported   the store has no conditional puts: it cannot hold checkpoints
HistoryError                    the store answered, and its content forbids to continue
├── IdentityMismatch            the prefix belongs to another job: choose another prefix
├── InvalidOrigin               the job's starting point cannot be used: name another one
├── GenerationTaken             a lineage record has this number or a higher one: take a higher number
├── PrefixTakenOver             another job took over the prefix: stop
├── AllCheckpointsCorrupt       checkpoints exist and none is usable: stop instead of starting from scratch
└── CheckpointCorrupt           a checkpoint differs from what was saved: resume from an earlier one
```
"""

from __future__ import annotations


class StoreError(Exception):
    """The store did not do what was asked."""


class ObjectNotFound(StoreError):
    """No object has this key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"there is no object {key}")
        self.key = key


class ObjectExists(StoreError):
    """A conditional put found an object under this key: possibly the caller's own, if an earlier answer was lost."""

    def __init__(self, key: str) -> None:
        super().__init__(f"an object {key} exists already")
        self.key = key


class StoreUnavailable(StoreError):
    """The store does not answer or cannot serve now: retry."""


class StoreRefused(StoreError):
    """The request cannot succeed until the user fixes something; a retry alone does not help."""


class NoSuchBucket(StoreRefused):
    """The bucket does not exist."""


class CredentialsRejected(StoreRefused):
    """The credentials are missing, rejected, or lack permission."""


class ConditionalPutUnsupported(StoreError):
    """The store does not honour conditional puts, so that two generations could both extend a history."""


class HistoryError(Exception):
    """The store answered, and its content forbids to continue."""


class IdentityMismatch(HistoryError):
    """The prefix holds the history of another job; nothing was written."""


class InvalidOrigin(HistoryError):
    """The job's starting point cannot be used: one sentence that names the field and the remedy."""


class GenerationTaken(HistoryError):
    """A lineage record has this generation's number or a higher one: a number above `highest` is needed."""

    def __init__(self, highest: int) -> None:
        super().__init__(f"generation {highest} has a lineage record already: take a number above it")
        self.highest = highest


class PrefixTakenOver(HistoryError):
    """Another job took over the prefix: this one must stop."""

    def __init__(self, generation: int, job_uid: str) -> None:
        super().__init__(
            f"job {job_uid} took over this prefix with generation {generation}: "
            "stop that job, or give this one another prefix"
        )
        self.generation = generation
        self.job_uid = job_uid


class AllCheckpointsCorrupt(HistoryError):
    """Checkpoints exist and every one was found corrupt."""

    def __init__(self, rejected: tuple[str, ...]) -> None:
        super().__init__(
            f"all {len(rejected)} checkpoints of this prefix are corrupt ({', '.join(rejected)}): "
            "restore one of them, or start from scratch under another prefix"
        )
        self.rejected = rejected


class CheckpointCorrupt(HistoryError):
    """A checkpoint differs from what was saved. `key` is that of its manifest."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"{key}: {why}")
        self.key = key
        self.why = why
