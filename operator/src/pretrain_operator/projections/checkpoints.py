"""What the status says of checkpoints, after each that came into force."""

from __future__ import annotations

from pretrain_api.checkpoint.lineage import parse_manifest_key
from pretrain_api.messages.reports import Saved
from pretrain_api.status.job import CheckpointSummary, JobStatus

REMEMBERED_SAVES = 5
SAVES_IN_GRACE = 3.0
"""A worker that ends may find a save under way, then takes its own, and disks have bad days."""
GRACE_SECONDS = (30.0, 600.0)
"""A worker that is taken away on purpose has at least and at most so long to end."""


def in_force(status: JobStatus, step: int, key: str, time: float) -> JobStatus:
    """The status once this checkpoint is the one to go on from."""
    books = status.bookkeeping
    return status.model_copy(
        update={
            "latest_checkpoint": key,
            "checkpoints": latest(status, key, time),
            "bookkeeping": books.model_copy(update={"checkpoint_step": max(books.checkpoint_step, step)}),
        }
    )


def counted(status: JobStatus, body: Saved) -> JobStatus:
    """The status with this save in its numbers."""
    books, before = status.bookkeeping, status.checkpoints
    seconds = (*books.save_seconds, round(body.seconds, 3))[-REMEMBERED_SAVES:]
    stall = before.stall_seconds + body.stall_seconds
    return status.model_copy(
        update={
            "bookkeeping": books.model_copy(update={"save_seconds": seconds}),
            "checkpoints": before.model_copy(update={"saved": before.saved + 1, "stall_seconds": stall}),
        }
    )


def latest(status: JobStatus, key: str | None, time: float | None = None) -> CheckpointSummary:
    """The summary with this checkpoint as the latest. One that was so before keeps the time it has."""
    before = status.checkpoints
    if key == status.latest_checkpoint and before.latest_time is not None:
        time = before.latest_time
    place = parse_manifest_key(key) if key else None
    return before.model_copy(update={"latest_step": place[1] if place else None, "latest_time": time})


def grace_seconds(status: JobStatus) -> float:
    """What a worker needs to end with a checkpoint, from how long the last saves took."""
    least, most = GRACE_SECONDS
    slowest = max(status.bookkeeping.save_seconds, default=0.0)
    return min(most, max(least, SAVES_IN_GRACE * slowest))
