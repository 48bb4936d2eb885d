"""Projection of the obstacle that the ranks of the current generation wait for."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain_api.messages.reports import Blocked, StepDone, Unblocked
from pretrain_api.status.job import JobStatus, Obstacle
from pretrain_operator.facts.fact import GenerationAdopted, GenerationAnnounced, GenerationEnded
from pretrain_operator.projections.projection import NO_EFFECTS, Context, Effects, Projection, on


@dataclass(frozen=True)
class ObstacleSlice:
    """Slice of the status: what the ranks wait for; None if nothing."""

    ranks_wait: Obstacle | None = None


Folded = tuple[ObstacleSlice, Effects]
FREE = ObstacleSlice()


def restore(status: JobStatus) -> ObstacleSlice:
    """Read the slice."""
    return ObstacleSlice(status.bookkeeping.ranks_wait)


def write(slice_: ObstacleSlice, status: JobStatus) -> JobStatus:
    """Return the status with the slice in it."""
    books = status.bookkeeping.model_copy(update={"ranks_wait": slice_.ranks_wait})
    return status.model_copy(update={"bookkeeping": books})


def adopted(slice_: ObstacleSlice, fact: GenerationAdopted, context: Context) -> Folded:
    """Keep the obstacle unless the generation is a newer one than the status knew."""
    return FREE if fact.generation.number > context.membership.highest else slice_, NO_EFFECTS


def generation_changed(_: ObstacleSlice, __: GenerationAnnounced | GenerationEnded, ___: Context) -> Folded:
    """Forget the obstacle of a generation that is over."""
    return FREE, NO_EFFECTS


def step_done(slice_: ObstacleSlice, _: StepDone, context: Context) -> Folded:
    """Forget the obstacle: the ranks train."""
    return slice_ if context.late else FREE, NO_EFFECTS


def blocked(_: ObstacleSlice, body: Blocked, __: Context) -> Folded:
    """Note the obstacle."""
    return ObstacleSlice(Obstacle(reason=body.reason, message=body.message)), NO_EFFECTS


def unblocked(_: ObstacleSlice, __: Unblocked, ___: Context) -> Folded:
    """Forget the obstacle: it is resolved."""
    return FREE, NO_EFFECTS


OBSTACLE = Projection(
    name="obstacle",
    restore=restore,
    write=write,
    rules=(
        on(GenerationAdopted, adopted),
        on(GenerationAnnounced, generation_changed),
        on(GenerationEnded, generation_changed),
        on(StepDone, step_done),
        on(Blocked, blocked),
        on(Unblocked, unblocked),
    ),
)
