"""Projection of goodput: every second of a job's life belongs to exactly one state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pretrain_api.messages.reports import (
    Blocked,
    Diverged,
    Evaluated,
    Finished,
    Held,
    Restored,
    Resumed,
    RolledBack,
    Sampled,
    Started,
    StepDone,
    Unblocked,
)
from pretrain_api.status.job import Goodput, GoodputState, JobStatus
from pretrain_operator.facts.fact import GenerationAnnounced, GenerationEnded, JobEnded, PodsObserved
from pretrain_operator.projections.projection import NO_EFFECTS, Context, Effects, Projection, on

WITHOUT_WORKERS: tuple[GoodputState, ...] = ("queued", "suspended")
"""States in which no worker runs: excluded from the ratio."""
STEPPING: tuple[GoodputState, ...] = ("training", "redoing")
ALL = float("inf")
"""Seconds: as much as there is."""


@dataclass(frozen=True)
class GoodputSlice:
    """Slice of the status: goodput.

    Seconds after `counted_until` belong to `state` once a fact tells how long it lasted. So the goodput of an idle job
    does not change, and an outage of the operator is accounted for by the reports that are replayed afterwards. Time
    never runs backwards: a late fact counts from `counted_until`.
    """

    state: GoodputState = "queued"
    counted_until: float | None = None
    seconds: tuple[tuple[GoodputState, float], ...] = ()
    held_step: int = -1
    """Step at which the ranks of the current generation held."""

    def switch(self, state: GoodputState, at: float) -> GoodputSlice:
        """End the present state at `at` and begin `state`."""
        return replace(self.spend(at, {}, self.state), state=state)

    def spend(self, until: float, parts: Mapping[GoodputState, float], rest: GoodputState) -> GoodputSlice:
        """Account for the time up to `until`: `parts` as far as there is enough of it, the remainder as `rest`."""
        start = until if self.counted_until is None else self.counted_until
        left = max(0.0, until - start)
        seconds = dict(self.seconds)
        spending: tuple[tuple[GoodputState, float], ...] = (*parts.items(), (rest, ALL))
        for state, wanted in spending:
            taken = min(max(0.0, wanted), left)
            left -= taken
            if taken:
                seconds[state] = seconds.get(state, 0.0) + taken
        return replace(self, counted_until=max(start, until), seconds=tuple(seconds.items()))

    def between_steps(self, until: float, parts: Mapping[GoodputState, float]) -> GoodputSlice:
        """Account for work of the ranks between two steps."""
        return self.spend(until, parts, self.state) if self.state in STEPPING else self

    @property
    def goodput(self) -> Goodput:
        """Seconds of each state up to `counted_until`, and the share of training."""
        seconds = dict(self.seconds)
        working = sum(spent for state, spent in seconds.items() if state not in WITHOUT_WORKERS)
        return Goodput(ratio=seconds.get("training", 0.0) / working if working else 0.0, seconds=seconds)


Folded = tuple[GoodputSlice, Effects]


def restore(status: JobStatus) -> GoodputSlice:
    """Read the slice."""
    books = status.bookkeeping
    seconds = status.goodput.seconds if status.goodput else {}
    return GoodputSlice(books.state, books.counted_until, tuple(seconds.items()))


def write(slice_: GoodputSlice, status: JobStatus) -> JobStatus:
    """Return the status with the slice in it."""
    books = {"state": slice_.state, "counted_until": slice_.counted_until}
    return status.model_copy(
        update={"goodput": slice_.goodput, "bookkeeping": status.bookkeeping.model_copy(update=books)}
    )


def pods_observed(slice_: GoodputSlice, fact: PodsObserved, _: Context) -> Folded:
    """Start the clock, and follow suspension and the first running pod."""
    if slice_.counted_until is None:
        slice_ = slice_.switch(slice_.state, fact.time)
    if fact.suspended != (slice_.state == "suspended"):
        slice_ = slice_.switch("suspended" if fact.suspended else "queued", fact.time)
    if slice_.state == "queued" and fact.running:
        slice_ = slice_.switch("starting", fact.time)
    return slice_, NO_EFFECTS


def announced(slice_: GoodputSlice, fact: GenerationAnnounced, _: Context) -> Folded:
    """Begin to start a generation, unless a recovery or a hold lasts until it trains."""
    slice_ = replace(slice_, held_step=-1)
    return slice_.switch("starting", fact.time) if slice_.state in STEPPING else slice_, NO_EFFECTS


def ended(slice_: GoodputSlice, fact: GenerationEnded, _: Context) -> Folded:
    """Begin a recovery at the time of the fault, or a hold at a planned end."""
    if slice_.state == "suspended" or (fact.intended and slice_.state == "recovering"):
        return slice_, NO_EFFECTS
    if fact.intended:
        return slice_.switch("holding", fact.time), NO_EFFECTS
    return slice_.switch("recovering", fact.fault_time), NO_EFFECTS


def started(slice_: GoodputSlice, body: Started, context: Context) -> Folded:
    """Begin to restore when the last rank runs."""
    membership = context.membership
    if slice_.state != "starting" or not membership.knows(context.generation):
        return slice_, NO_EFFECTS
    if membership.with_started(body.rank, context.time).all_started_at is None:
        return slice_, NO_EFFECTS
    return slice_.switch("restoring", context.time), NO_EFFECTS


def restored(slice_: GoodputSlice, body: Restored, context: Context) -> Folded:
    """Begin to train, unless the job holds or is suspended."""
    if slice_.state in ("holding", "suspended"):
        return slice_, NO_EFFECTS
    return slice_.switch(_kind(body.step + 1, context), context.time), NO_EFFECTS


def step_done(slice_: GoodputSlice, body: StepDone, context: Context) -> Folded:
    """Account for a step. One that a hold already accounted for, or of a generation that has ended, is skipped."""
    if context.late or body.step <= slice_.held_step:
        return slice_, NO_EFFECTS
    kind = _kind(body.step, context)
    if slice_.state not in STEPPING:
        slice_ = slice_.switch(kind, context.time - body.seconds)
    slice_ = slice_.spend(context.time, {"saving": body.stall_seconds}, kind)
    return replace(slice_, state=_kind(body.step + 1, context)), NO_EFFECTS


def held(slice_: GoodputSlice, body: Held, context: Context) -> Folded:
    """Account for the checkpoint, then hold."""
    slice_ = replace(slice_, held_step=max(slice_.held_step, body.step))
    if slice_.state not in STEPPING:
        return slice_, NO_EFFECTS
    return slice_.between_steps(context.time, {"saving": ALL}).switch("holding", context.time), NO_EFFECTS


def resumed(slice_: GoodputSlice, _: Resumed, context: Context) -> Folded:
    """Train after a hold that nothing followed."""
    if slice_.state != "holding":
        return slice_, NO_EFFECTS
    return slice_.switch(_kind(context.position.step + 1, context), context.time), NO_EFFECTS


def evaluated(slice_: GoodputSlice, body: Evaluated, context: Context) -> Folded:
    """Account for an evaluation."""
    return slice_.between_steps(context.time, {"evaluating": body.seconds}), NO_EFFECTS


def sampled(slice_: GoodputSlice, _: Sampled, context: Context) -> Folded:
    """Account for the generation of a text."""
    return slice_.between_steps(context.time, {"evaluating": ALL}), NO_EFFECTS


def diverged(slice_: GoodputSlice, body: Diverged, context: Context) -> Folded:
    """Begin a recovery if a rollback follows."""
    return slice_.switch("recovering", context.time) if body.action == "Rollback" else slice_, NO_EFFECTS


def rolled_back(slice_: GoodputSlice, body: RolledBack, context: Context) -> Folded:
    """Train from the earlier step."""
    slice_ = replace(slice_, held_step=-1)
    return slice_.switch(_kind(body.rollback.to_step + 1, context), context.time), NO_EFFECTS


def blocked(slice_: GoodputSlice, _: Blocked, context: Context) -> Folded:
    """Count waiting for something outside as recovery."""
    if slice_.state not in STEPPING:
        return slice_, NO_EFFECTS
    return slice_.switch("recovering", context.time), NO_EFFECTS


def unblocked(slice_: GoodputSlice, _: Unblocked, context: Context) -> Folded:
    """Train again, unless the ranks have yet to restore a state."""
    if slice_.state != "recovering" or context.restoring:
        return slice_, NO_EFFECTS
    return slice_.switch(_kind(context.before.step + 1, context), context.time), NO_EFFECTS


def finished(slice_: GoodputSlice, _: Finished, context: Context) -> Folded:
    """Account for the last checkpoint and stop the clock."""
    slice_ = slice_.between_steps(context.time, {"saving": ALL})
    return slice_.switch(slice_.state, context.time), NO_EFFECTS


def job_ended(slice_: GoodputSlice, fact: JobEnded, _: Context) -> Folded:
    """Stop the clock."""
    return slice_.switch(slice_.state, fact.time), NO_EFFECTS


def _kind(step: int, context: Context) -> GoodputState:
    return "redoing" if step <= context.highest_step else "training"


GOODPUT = Projection(
    name="goodput",
    restore=restore,
    write=write,
    rules=(
        on(PodsObserved, pods_observed),
        on(GenerationAnnounced, announced),
        on(GenerationEnded, ended),
        on(Started, started),
        on(Restored, restored),
        on(StepDone, step_done),
        on(Held, held),
        on(Resumed, resumed),
        on(Evaluated, evaluated),
        on(Sampled, sampled),
        on(Diverged, diverged),
        on(RolledBack, rolled_back),
        on(Blocked, blocked),
        on(Unblocked, unblocked),
        on(Finished, finished),
        on(JobEnded, job_ended),
    ),
)
