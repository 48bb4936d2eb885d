"""Projection of checkpoints: the latest one, counts, durations."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pretrain_api.checkpoint.lineage import parse_manifest_key
from pretrain_api.messages.reports import Finished, Held, Restored, RolledBack, Saved, SaveFailed
from pretrain_api.status.job import CheckpointSummary, JobStatus
from pretrain_operator.cluster import Event
from pretrain_operator.projections.projection import NO_EFFECTS, Context, Effects, Measurement, Projection, on

REMEMBERED_SAVES = 5
SAVES_IN_GRACE = 3.0
"""A worker that ends may have to complete one save and take another, with a margin for a slow disk."""
GRACE_SECONDS = (30.0, 600.0)
"""Least and greatest time that a worker gets to end with a checkpoint."""


NO_CHECKPOINTS = CheckpointSummary()


@dataclass(frozen=True)
class CheckpointSlice:
    """Slice of the status: checkpoints."""

    latest: str | None = None
    """Key of the manifest that a restart would load."""
    summary: CheckpointSummary = NO_CHECKPOINTS
    checkpoint_step: int = 0
    """A checkpoint of a later step is progress."""
    save_seconds: tuple[float, ...] = ()
    """Durations of the last saves."""

    @property
    def grace_seconds(self) -> float:
        """Time that a worker needs to end with a checkpoint, estimated from the last saves."""
        least, most = GRACE_SECONDS
        return min(most, max(least, SAVES_IN_GRACE * max(self.save_seconds, default=0.0)))

    def with_latest(self, key: str | None, time: float | None = None) -> CheckpointSlice:
        """Replace the latest checkpoint. One that is the latest already keeps its time."""
        if key == self.latest and self.summary.latest_time is not None:
            time = self.summary.latest_time
        summary = self.summary.model_copy(update={"latest_step": _step(key), "latest_time": time})
        return replace(self, latest=key, summary=summary)

    def committed(self, step: int, key: str, time: float) -> CheckpointSlice:
        """Replace the latest checkpoint by one that ranks committed."""
        return replace(self.with_latest(key, time), checkpoint_step=max(self.checkpoint_step, step))


Folded = tuple[CheckpointSlice, Effects]


def restore(status: JobStatus) -> CheckpointSlice:
    """Read the slice."""
    books = status.bookkeeping
    return CheckpointSlice(status.latest_checkpoint, status.checkpoints, books.checkpoint_step, books.save_seconds)


def write(slice_: CheckpointSlice, status: JobStatus) -> JobStatus:
    """Return the status with the slice in it."""
    books = {"checkpoint_step": slice_.checkpoint_step, "save_seconds": slice_.save_seconds}
    return status.model_copy(
        update={
            "latest_checkpoint": slice_.latest,
            "checkpoints": slice_.summary,
            "bookkeeping": status.bookkeeping.model_copy(update=books),
        }
    )


def restored(slice_: CheckpointSlice, body: Restored, _: Context) -> Folded:
    """Follow the restored state, which may be older than the latest checkpoint."""
    # A state in the memory of workers may be newer than its checkpoint, which is the one that counts.
    step = max(slice_.checkpoint_step, _step(body.checkpoint) or 0)
    return replace(slice_.with_latest(body.checkpoint), checkpoint_step=step), NO_EFFECTS


def rolled_back(slice_: CheckpointSlice, body: RolledBack, _: Context) -> Folded:
    """Follow the state that the ranks returned to."""
    return slice_.with_latest(body.checkpoint), NO_EFFECTS


def saved(slice_: CheckpointSlice, body: Saved, context: Context) -> Folded:
    """Count a save and commit its checkpoint."""
    slice_ = slice_.committed(body.step, body.checkpoint, context.time)
    stall = slice_.summary.stall_seconds + body.stall_seconds
    counts = {"saved": slice_.summary.saved + 1, "stall_seconds": stall}
    changed = replace(
        slice_,
        summary=slice_.summary.model_copy(update=counts),
        save_seconds=(*slice_.save_seconds, round(body.seconds, 3))[-REMEMBERED_SAVES:],
    )
    event = Event("Normal", "CheckpointSaved", f"checkpoint of step {body.step} in {body.seconds:.2f} s")
    measurements = (
        Measurement("checkpoint_seconds", body.seconds),
        Measurement("checkpoint_bytes", body.bytes),
        Measurement("checkpoint_stall", body.stall_seconds),
    )
    return changed, Effects(events=(event,), measurements=measurements)


def save_failed(slice_: CheckpointSlice, body: SaveFailed, _: Context) -> Folded:
    """Report a save without a checkpoint; the next interval retries."""
    event = Event("Warning", "SaveFailed", f"no checkpoint of step {body.step}: {body.message}")
    return slice_, Effects(events=(event,), measurements=(Measurement("checkpoint_failures"),))


def held(slice_: CheckpointSlice, body: Held, context: Context) -> Folded:
    """Commit the checkpoint of a hold, unless a replayed report names one that later ones replaced."""
    place = parse_manifest_key(body.checkpoint)
    if place is not None and place < context.before.lineage:
        return slice_, NO_EFFECTS
    return slice_.committed(body.step, body.checkpoint, context.time), NO_EFFECTS


def finished(slice_: CheckpointSlice, body: Finished, context: Context) -> Folded:
    """Commit the last checkpoint."""
    return slice_.committed(body.step, body.checkpoint, context.time), NO_EFFECTS


def _step(key: str | None) -> int | None:
    place = parse_manifest_key(key) if key else None
    return place[1] if place is not None else None


CHECKPOINTS = Projection(
    name="checkpoints",
    restore=restore,
    write=write,
    rules=(
        on(Restored, restored),
        on(RolledBack, rolled_back),
        on(Saved, saved),
        on(SaveFailed, save_failed),
        on(Held, held),
        on(Finished, finished),
    ),
)
