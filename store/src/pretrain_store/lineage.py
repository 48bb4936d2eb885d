"""The rules of lineage: pure decisions over a listing. `history` reads the listing and acts.

The line is the chain from the highest-numbered record: that generation's own checkpoints, then its parent, then the
parent's generation up to it, and so on. A record names its parent once and for all, so what a zombie commits later is
on nobody's chain, and no clock is needed.

A record that cannot be read still owns its number: somebody put it and may be training under it, so the next number
must be higher, and its own checkpoints are the newest. Where it went on from is unknown: the chain ends there, and
nothing before that point is deleted for being off the line.

A rollback is a record whose parent lies before the trouble. What earlier generations saved after that point is given
up: it is off the line from then on, and not even a last resort. Each record repeats the rollbacks and the course (the
skipped data, the lowered learning rates) of the highest one before it, so that the newest record says it all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from pretrain_api.checkpoint.lineage import (
    LineageRecord,
    Manifest,
    MemoryState,
    Rollback,
    SlowedRange,
    StepRange,
    data_step,
    merged,
    parse_manifest_key,
)
from pretrain_api.spec.job import Retain
from pretrain_store.errors import NoUsableCheckpoint, Superseded

KEEP_AT_LEAST = 2
"""The newest may turn out to be corrupt."""


@dataclass(frozen=True)
class Listing:
    """What a prefix holds: the readable records by generation, the keys of all manifests, and the rest's numbers."""

    records: Mapping[int, LineageRecord]
    manifests: frozenset[str]
    unreadable: frozenset[int] = frozenset()

    @property
    def highest(self) -> int:
        """The highest number that a record owns, readable or not; 0: none."""
        return max((*self.records, *self.unreadable), default=0)


@dataclass(frozen=True)
class Later:
    """A record above one's own: stop. `job_uid` is None when the record cannot be read."""

    generation: int
    job_uid: str | None


@dataclass(frozen=True)
class Choice:
    """Where a new generation goes on from, both for its record. A null parent: from nothing."""

    parent: str | None
    rejected: tuple[str, ...]


@dataclass(frozen=True)
class Course:
    """What holds for everybody who goes on from here."""

    skipped: tuple[StepRange, ...] = ()
    slowed: tuple[SlowedRange, ...] = ()
    rollbacks: tuple[Rollback, ...] = ()


@dataclass(frozen=True)
class Deletion:
    """Manifest keys of the checkpoints that the holder of `generation` may delete, oldest first."""

    generation: int
    checkpoints: tuple[str, ...]


@dataclass(frozen=True)
class _Chain:
    line: tuple[str, ...]
    reached: int
    """The lowest generation whose part is known; 0: all, down to a null parent."""


def plausible(number: int, record: LineageRecord) -> bool:
    """Whether `record`, found under the key of `number`, can be a link of a chain: parents have lower numbers."""
    if record.generation != number:
        return False
    if record.parent is None:
        return True
    place = parse_manifest_key(record.parent)
    return place is not None and place[0] < number


def line(listing: Listing) -> tuple[str, ...]:
    """The manifest keys of the one history, newest first, their steps strictly decreasing."""
    return _chain(listing, listing.highest).line


def intact(listing: Listing) -> tuple[str, ...]:
    """The line without what was found corrupt, newest first."""
    refused = found_corrupt(listing)
    return tuple(key for key in line(listing) if key not in refused)


def choose_parent(listing: Listing, rejected: Collection[str]) -> Choice:
    """The newest checkpoint of the line that nobody rejected; if it has none, the newest of any lower generation.

    The parent is null only when the prefix has no manifest but those that rollbacks gave up. Raises NoUsableCheckpoint
    when all others are rejected.
    """
    refused = found_corrupt(listing) | frozenset(rejected)
    named = tuple(sorted(refused & listing.manifests | frozenset(rejected)))
    left = listing.manifests - given_up(listing)
    if not left:
        return Choice(parent=None, rejected=named)
    for key in _candidates(listing):
        if key in left and key not in refused:
            return Choice(parent=key, rejected=named)
    raise NoUsableCheckpoint(named)


def choose_return(listing: Listing, before: int, rejected: Collection[str] = ()) -> Choice:
    """Where to roll back to: the newest usable checkpoint of the line of a step below `before`; null: to the beginning.

    One that an earlier rollback went back to may be where the trouble comes from, so the one before it is taken where
    there is one.
    """
    corrupt = found_corrupt(listing) | frozenset(rejected)
    refused = corrupt | given_up(listing)
    usable = [key for key in line(listing) if key not in refused and _place(key)[1] < before]
    steps_tried = {rollback.to_step for rollback in _newest(listing).rollbacks}
    fresh = [key for key in usable if _place(key)[1] not in steps_tried]
    return Choice(next(iter(fresh or usable), None), tuple(sorted(corrupt & listing.manifests)))


def inherited(listing: Listing, parent: Manifest | None) -> Course:
    """The course of a generation that goes on from `parent`. What that has trained on cannot be skipped any more."""
    newest = _newest(listing)
    came = parent.skipped if parent is not None else ()
    trained = data_step(parent.step, came) if parent is not None else 0
    ahead = (
        StepRange(first=max(item.first, trained + 1), last=item.last) for item in newest.skipped if item.last > trained
    )
    slowed = parent.slowed if parent is not None else ()
    return Course(
        skipped=merged((*came, *ahead)),
        slowed=(*newest.slowed, *(item for item in slowed if item not in newest.slowed)),
        rollbacks=newest.rollbacks,
    )


def given_up(listing: Listing) -> frozenset[str]:
    """What rollbacks left behind: manifests of earlier generations, of steps after the one that was gone back to."""
    rollbacks = _newest(listing).rollbacks
    return frozenset(
        key
        for key in listing.manifests
        for generation, step in (_place(key),)
        if any(generation < rollback.generation and step > rollback.to_step for rollback in rollbacks)
    )


def found_corrupt(listing: Listing) -> frozenset[str]:
    """What any generation found corrupt stays rejected: nothing makes a checkpoint whole again."""
    return frozenset(key for record in listing.records.values() for key in record.rejected)


def continues(listing: Listing, parent: str | None, job_uid: str, state: MemoryState) -> bool:
    """Whether a generation that goes on from `parent` may take this state in memory instead, and stay one history.

    The state must be the newest generation's own, or the very one that this generation went on from and has committed
    nothing since; and `parent` must be on the line, not after it. See docs/decisions/0015.
    """
    record = listing.records.get(listing.highest)
    if record is None or record.job_uid != job_uid:
        return False
    if parent is None:
        committed_by, committed = 0, 0
    elif parent in line(listing):
        committed_by, committed = _place(parent)
    else:
        return False
    own = state.generation == record.generation and state.nonce == record.nonce
    named = state == record.resumed and committed_by < record.generation
    return (own or named) and state.step >= committed


def refuse_foreign(listing: Listing, job_uid: str, *, may_take_over: bool) -> None:
    """Raises Superseded when the history is another job's and this generation may not take it over.

    Only a job's first generation may: the job that is taken over would otherwise take the prefix back.
    """
    if may_take_over or not listing.records:
        return
    newest = listing.records[max(listing.records)]
    if newest.job_uid != job_uid:
        raise Superseded(newest.generation, newest.job_uid)


def superseded(listing: Listing, generation: int) -> Later | None:
    """The highest record above `generation`, if there is one: its holder must stop."""
    readable = max((number for number in listing.records if number > generation), default=0)
    if readable:
        return Later(readable, listing.records[readable].job_uid)
    return Later(listing.highest, None) if listing.highest > generation else None


def doomed(listing: Listing, generation: int, retain: Retain) -> Deletion:
    """The checkpoints that the holder of `generation` may delete: none unless its record is the highest.

    Of the line stay the newest `retain.last`, at least two, the multiples of `everySteps`, the pinned steps and the
    parent of the highest record. What is off the line or rejected goes if an earlier generation made it, but not before
    the line has two: until then it may be the last resort.
    """
    if listing.highest != generation or generation not in listing.records:
        return Deletion(generation, ())
    chain = _chain(listing, generation)
    refused = found_corrupt(listing) | given_up(listing)
    usable = [key for key in chain.line if key not in refused]
    if len(usable) < KEEP_AT_LEAST:
        return Deletion(generation, ())
    kept = {
        *usable[: max(KEEP_AT_LEAST, retain.last)],
        *(key for key in usable if retain.every_steps and _place(key)[1] % retain.every_steps == 0),
        *(key for key in usable if _place(key)[1] in retain.pin),
        listing.records[generation].parent,
    }
    aside = {
        key
        for key in listing.manifests - set(usable)
        if chain.reached <= _place(key)[0] < generation
    }  # fmt: skip
    return Deletion(generation, tuple(sorted((set(usable) | aside) - kept, key=_place)))


def _chain(listing: Listing, generation: int) -> _Chain:
    """The chain from the record of `generation`, whether or not that record or what it names is still there."""
    steps = _steps(listing)
    line: list[str] = []
    up_to: int | None = None
    while True:
        record = listing.records.get(generation)
        parent = _place(record.parent) if record is not None and record.parent is not None else None
        line += _own(steps.get(generation, {}), above=parent[1] if parent else -1, up_to=up_to)
        if record is None:
            return _Chain(tuple(line), generation)
        if parent is None:
            return _Chain(tuple(line), 0)
        # A generation may save the very step that it went on from, and its successor may name that: each step once.
        generation, up_to = parent[0], parent[1] if up_to is None else min(parent[1], up_to - 1)


def _own(steps: Mapping[int, str], *, above: int, up_to: int | None) -> list[str]:
    """A generation's part of a chain, newest first: after the step it went on from, up to the one its successor named.

    The one that was named belongs to it in any case.
    """
    chosen = [step for step in steps if step == up_to or (step > above and (up_to is None or step < up_to))]
    return [steps[step] for step in sorted(chosen, reverse=True)]


def _steps(listing: Listing) -> dict[int, dict[int, str]]:
    """Generation -> step -> manifest key."""
    steps: dict[int, dict[int, str]] = {}
    for key in listing.manifests:
        generation, step = _place(key)
        steps.setdefault(generation, {})[step] = key
    return steps


def _candidates(listing: Listing) -> Iterator[str]:
    """Every checkpoint, best first: the line, then what would be the line without the highest record, and so on."""
    for number in sorted({*listing.records, *listing.unreadable}, reverse=True):
        yield from _chain(listing, number).line
    yield from sorted(listing.manifests, key=_place, reverse=True)


def _newest(listing: Listing) -> Course:
    """The course that the highest readable record set."""
    if not listing.records:
        return Course()
    record = listing.records[max(listing.records)]
    return Course(record.skipped, record.slowed, record.rollbacks)


def _place(key: str) -> tuple[int, int]:
    """(generation, step) of a manifest's key."""
    place = parse_manifest_key(key)
    if place is None:
        raise ValueError(f"not a manifest's key: {key}")
    return place
