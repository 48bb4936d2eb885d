"""Projection of training progress: step, tokens, loss, speed, skipped data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime

from pretrain_api.checkpoint.lineage import StepRange
from pretrain_api.messages.reports import Diverged, Finished, Restored, RolledBack, StepDone
from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import StepRecord
from pretrain_operator.cluster import Event
from pretrain_operator.facts.pace import StepPace
from pretrain_operator.projections.projection import NO_EFFECTS, Context, Effects, Projection, on


@dataclass(frozen=True)
class ProgressSlice:
    """Slice of the status: progress."""

    step: int
    tokens: int
    loss: float | None
    tokens_per_second: float | None
    tokens_per_second_per_device: float | None
    mfu: float | None
    seconds_per_step: float | None
    parameters: int | None
    unigram_loss: float | None
    skipped: tuple[StepRange, ...]
    rollbacks: int
    highest_step: int
    """Steps above it are trained for the first time."""
    pace: StepPace


Folded = tuple[ProgressSlice, Effects]


def restore(status: JobStatus) -> ProgressSlice:
    """Read the slice."""
    return ProgressSlice(
        step=status.step,
        tokens=status.tokens,
        loss=status.loss,
        tokens_per_second=status.tokens_per_second,
        tokens_per_second_per_device=status.tokens_per_second_per_device,
        mfu=status.mfu,
        seconds_per_step=status.seconds_per_step,
        parameters=status.parameters,
        unigram_loss=status.unigram_loss,
        skipped=status.skipped,
        rollbacks=status.rollbacks,
        highest_step=status.bookkeeping.highest_step,
        pace=StepPace(known_mean=status.seconds_per_step),
    )


def write(slice_: ProgressSlice, status: JobStatus) -> JobStatus:
    """Return the status with the slice in it."""
    return status.model_copy(
        update={
            "step": slice_.step,
            "tokens": slice_.tokens,
            "loss": slice_.loss,
            "tokens_per_second": slice_.tokens_per_second,
            "tokens_per_second_per_device": slice_.tokens_per_second_per_device,
            "mfu": slice_.mfu,
            "seconds_per_step": slice_.seconds_per_step,
            "parameters": slice_.parameters,
            "unigram_loss": slice_.unigram_loss,
            "skipped": slice_.skipped,
            "rollbacks": slice_.rollbacks,
            "bookkeeping": status.bookkeeping.model_copy(update={"highest_step": slice_.highest_step}),
        }
    )


def restored(slice_: ProgressSlice, body: Restored, context: Context) -> Folded:
    """Continue from the restored state. Its steps that were never reported become records now."""
    before = context.before
    missing = tuple(step for step in body.steps if before.step < step.step <= body.step)
    workers = context.membership.workers(before.generation)
    number = before.number(before.generation)
    records = tuple(step_record(step, number, context.time, workers, None) for step in missing)
    changed = replace(
        slice_,
        step=context.position.step,
        loss=missing[-1].loss if missing else slice_.loss,
        parameters=body.parameters or slice_.parameters,
        unigram_loss=slice_.unigram_loss if body.unigram_loss is None else body.unigram_loss,
        skipped=body.skipped,
        rollbacks=len(body.rollbacks),
        highest_step=max(slice_.highest_step, body.step),
    )
    events = (Event("Normal", "Begun", f"initial weights: {body.origin}"),) if body.origin else ()
    return changed, Effects(events=events, steps=records)


def step_done(slice_: ProgressSlice, body: StepDone, context: Context) -> Folded:
    """Record a completed step, of a generation that has ended too."""
    membership, generation = context.membership, context.generation
    workers, devices = membership.workers(generation), membership.devices(generation)
    record = step_record(body, context.number, context.time, workers, devices)
    pace = slice_.pace.stepped(body.step, context.time, body.seconds)
    changed = replace(
        slice_,
        step=context.position.step,
        tokens=body.tokens,
        loss=body.loss,
        tokens_per_second=body.tokens_per_second,
        tokens_per_second_per_device=record.tokens_per_second_per_device,
        mfu=body.mfu,
        seconds_per_step=pace.mean_seconds,
        highest_step=max(slice_.highest_step, body.step),
        pace=pace,
    )
    return changed, Effects(steps=(record,))


def diverged(slice_: ProgressSlice, body: Diverged, context: Context) -> Folded:
    """Count a step whose update was dropped: no other report completes it."""
    if body.action != "Drop":
        return slice_, NO_EFFECTS
    highest = max(slice_.highest_step, body.step)
    return replace(slice_, step=context.position.step, highest_step=highest), NO_EFFECTS


def rolled_back(slice_: ProgressSlice, body: RolledBack, context: Context) -> Folded:
    """Continue from an earlier step."""
    changed = replace(
        slice_, step=context.position.step, tokens=body.tokens, skipped=body.skipped, rollbacks=body.count
    )
    return changed, NO_EFFECTS


def finished(slice_: ProgressSlice, body: Finished, context: Context) -> Folded:
    """Record the last step."""
    return replace(slice_, step=context.position.step, tokens=body.tokens), NO_EFFECTS


def step_record(body: StepDone, generation: int, time: float, workers: int, devices: int | None) -> StepRecord:
    """Build a line of `metrics.jsonl`. `devices` is the number of training processes, None if unknown."""
    memory = body.memory
    return StepRecord(
        **body.model_dump(exclude={"kind", "loss_contribution", "memory"}),
        generation=generation,
        workers=workers,
        time=time,
        tokens_per_second_per_device=body.tokens_per_second / devices if devices else None,
        memory_bytes=memory.bytes if memory else None,
        memory_peak_bytes=memory.peak_bytes if memory else None,
        memory_reserved_bytes=memory.reserved_bytes if memory else None,
        alloc_retries=memory.alloc_retries if memory else 0,
    )


def expected_end(step: int, total: int, stepped_at: float | None, seconds_per_step: float | None) -> str:
    """Estimate when the last step completes, in RFC 3339; empty if unknown or complete."""
    if stepped_at is None or seconds_per_step is None or step >= total:
        return ""
    end = stepped_at + (total - step) * seconds_per_step
    try:
        return datetime.fromtimestamp(end, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError):  # beyond the last year that a date can have
        return ""


PROGRESS = Projection(
    name="progress",
    restore=restore,
    write=write,
    rules=(
        on(Restored, restored),
        on(StepDone, step_done),
        on(Diverged, diverged),
        on(RolledBack, rolled_back),
        on(Finished, finished),
    ),
)
