"""Projection of generations: numbers, members, and the list of those that trained."""

from __future__ import annotations

from pretrain_api.messages.reports import Restored, RolledBack, Started, StepDone
from pretrain_api.status.job import GenerationSummary, JobStatus
from pretrain_operator.cluster import Event
from pretrain_operator.facts.fact import GenerationAdopted, GenerationAnnounced
from pretrain_operator.projections.membership import Membership
from pretrain_operator.projections.projection import NO_EFFECTS, Context, Effects, Projection, counted, on

Folded = tuple[Membership, Effects]


def restore(status: JobStatus) -> Membership:
    """Read the slice; the members of the current generation come with the next fact that names it."""
    return Membership(status.generation, status.generations)


def write(slice_: Membership, status: JobStatus) -> JobStatus:
    """Return the status with the slice in it."""
    return status.model_copy(update={"generation": slice_.highest, "generations": slice_.summaries})


def adopted(slice_: Membership, fact: GenerationAdopted, _: Context) -> Folded:
    """Take over a generation that another process announced."""
    return slice_.with_current(fact.generation), NO_EFFECTS


def announced(slice_: Membership, fact: GenerationAnnounced, _: Context) -> Folded:
    """Begin the next generation."""
    generation = fact.generation
    text = f"generation {generation.number} with {counted(len(generation.members), 'worker')}: {generation.reason}"
    return slice_.with_current(generation), Effects(events=(Event("Normal", "GenerationFormed", text),))


def started(slice_: Membership, body: Started, context: Context) -> Folded:
    """Note a rank that runs."""
    if not slice_.knows(context.generation):
        return slice_, NO_EFFECTS
    return slice_.with_started(body.rank, context.time), NO_EFFECTS


def restored(slice_: Membership, body: Restored, context: Context) -> Folded:
    """List the generation: it starts to train from the restored step."""
    return _listed(slice_, context.generation, body.step), NO_EFFECTS


def step_done(slice_: Membership, body: StepDone, context: Context) -> Folded:
    """List the generation if its restore was not reported."""
    return _listed(slice_, context.generation, body.step - 1), NO_EFFECTS


def rolled_back(slice_: Membership, body: RolledBack, context: Context) -> Folded:
    """List the same members under the number that they took."""
    summary = GenerationSummary(
        number=body.number,
        workers=slice_.workers(context.generation),
        started_at_step=body.rollback.to_step,
        reason="RolledBack",
        formed_as=context.generation,
    )
    return slice_.with_summary(summary), NO_EFFECTS


def _listed(slice_: Membership, number: int, step: int) -> Membership:
    if slice_.summaries and slice_.summaries[-1].number >= number:
        return slice_
    reason = slice_.current.reason if slice_.current is not None and slice_.knows(number) else ""
    summary = GenerationSummary(number=number, workers=slice_.workers(number), started_at_step=step, reason=reason)
    return slice_.with_summary(summary)


GENERATIONS = Projection(
    name="generations",
    restore=restore,
    write=write,
    rules=(
        on(GenerationAdopted, adopted),
        on(GenerationAnnounced, announced),
        on(Started, started),
        on(Restored, restored),
        on(StepDone, step_done),
        on(RolledBack, rolled_back),
    ),
)
