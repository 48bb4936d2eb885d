"""All errors of this package, translated once at the edge of each adapter.

```
StoreError                    the store did not do what was asked
├── Missing                   there is no object under this key
├── Exists                    a conditional put found an object under this key
├── Unavailable               retry: no answer, throttled, a broken connection, a full disk
├── Refused                   the user mends it: a folder that cannot be written, half of the credentials
│   ├── BucketMissing         there is no such bucket: somebody may yet make it
│   └── AccessDenied          credentials that are refused, or that may not do this: somebody may yet allow it
└── Unsupported               the store has no conditional puts: it cannot hold checkpoints
HistoryError                  the store answered, and what it holds forbids to go on
├── IdentityMismatch          the prefix belongs to another job: the user chooses another one
├── UnfitOrigin               what a job is to start from cannot be used: the user names something else
├── NumberTaken               somebody else has this generation's number, or a higher one: take a higher one
├── Superseded                another job took over the prefix: stop
├── NoUsableCheckpoint        checkpoints exist, none can be used: stop, for fear of starting from nothing
└── Corrupt                   a checkpoint is not what was saved: go on from the one before it
```
"""

from __future__ import annotations


class StoreError(Exception):
    """The store did not do what was asked."""


class Missing(StoreError):
    """There is no object under this key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"there is no object {key}")
        self.key = key


class Exists(StoreError):
    """A conditional put found an object under this key. It may be the caller's own: an answer may have been lost."""

    def __init__(self, key: str) -> None:
        super().__init__(f"an object {key} exists already")
        self.key = key


class Unavailable(StoreError):
    """The store does not answer or cannot serve now: retry."""


class Refused(StoreError):
    """What was asked cannot be done here: the user mends it, a retry by itself cannot help."""


class BucketMissing(Refused):
    """There is no such bucket."""


class AccessDenied(Refused):
    """The credentials are missing, refused, or do not allow what was asked."""


class Unsupported(StoreError):
    """The store does not honour conditional puts, so that two generations could both extend a history."""


class HistoryError(Exception):
    """The store answered, and what it holds forbids to go on."""


class IdentityMismatch(HistoryError):
    """The prefix holds the history of another job; nothing was written."""


class UnfitOrigin(HistoryError):
    """What a job is to start from cannot be used: one sentence that names the field and the remedy."""


class NumberTaken(HistoryError):
    """Somebody else has this generation's number or a higher one: a number above `highest` is needed."""

    def __init__(self, highest: int) -> None:
        super().__init__(f"generation {highest} has a lineage record already: take a number above it")
        self.highest = highest


class Superseded(HistoryError):
    """Another job took over the prefix: this one must stop."""

    def __init__(self, generation: int, job_uid: str) -> None:
        super().__init__(
            f"job {job_uid} took over this prefix with generation {generation}: "
            "stop that job, or give this one another prefix"
        )
        self.generation = generation
        self.job_uid = job_uid


class NoUsableCheckpoint(HistoryError):
    """Checkpoints exist and every one was found corrupt."""

    def __init__(self, rejected: tuple[str, ...]) -> None:
        super().__init__(
            f"all {len(rejected)} checkpoints of this prefix are corrupt ({', '.join(rejected)}): "
            "restore one of them, or start anew under another prefix"
        )
        self.rejected = rejected


class Corrupt(HistoryError):
    """A checkpoint is not what was saved. `key` is that of its manifest."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"{key}: {why}")
        self.key = key
        self.why = why
