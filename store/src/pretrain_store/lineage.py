"""Checkpoint lineage: the chain of checkpoints that forms one history. Pure; `history` reads the listing and acts.

The chain starts at the highest-numbered record: that generation's own checkpoints, then its parent, then the
parent's generation up to it, and so on. A record names its parent once and for all, so a zombie's late commit is in no
chain, and no clock is needed.

A record that cannot be read still owns its number: its writer may be training under it, so the next number must be
higher, and its own checkpoints are the newest. Its parent is unknown: the chain ends there, and nothing before that
point is deleted for being outside the lineage.

A rollback is a record whose parent lies before the trouble. Checkpoints that earlier generations saved after that
point leave the lineage, and are not even a last resort. Each record repeats the rollbacks and the interventions (the
skipped data, the lowered learning rates) of the highest one before it, so that the newest record has them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pretrain_api.checkpoint.lineage import (
    LineageRecord,
    MemoryState,
    Rollback,
    SlowedRange,
    StepRange,
    parse_manifest_key,
)
from pretrain_store.errors import PrefixTakenOver


@dataclass(frozen=True)
class Listing:
    """Content of a prefix: readable records by generation, keys of all manifests, numbers of unreadable records."""

    records: Mapping[int, LineageRecord]
    manifests: frozenset[str]
    unreadable: frozenset[int] = frozenset()

    @property
    def highest(self) -> int:
        """The highest number that a record owns, readable or not; 0: none."""
        return max((*self.records, *self.unreadable), default=0)


@dataclass(frozen=True)
class LaterRecord:
    """A record above one's own: stop. `job_uid` is None when the record cannot be read."""

    generation: int
    job_uid: str | None


@dataclass(frozen=True)
class Interventions:
    """Changes to the course of training that every later generation inherits."""

    skipped: tuple[StepRange, ...] = ()
    slowed: tuple[SlowedRange, ...] = ()
    rollbacks: tuple[Rollback, ...] = ()


@dataclass(frozen=True)
class Chain:
    """A chain of checkpoints, newest first."""

    keys: tuple[str, ...]
    reached: int
    """The lowest generation whose part is known; 0: all, down to a null parent."""


def is_chain_link(number: int, record: LineageRecord) -> bool:
    """Decide whether `record`, found under the key of `number`, can be part of a chain: parents have lower numbers."""
    if record.generation != number:
        return False
    if record.parent is None:
        return True
    place = parse_manifest_key(record.parent)
    return place is not None and place[0] < number


def checkpoint_chain(listing: Listing) -> tuple[str, ...]:
    """Return the manifest keys of the one history, newest first, their steps strictly decreasing."""
    return chain_of(listing, listing.highest).keys


def intact_chain(listing: Listing) -> tuple[str, ...]:
    """Return the chain without checkpoints known to be corrupt, newest first."""
    corrupt = known_corrupt(listing)
    return tuple(key for key in checkpoint_chain(listing) if key not in corrupt)


def chain_of(listing: Listing, generation: int) -> Chain:
    """Return the chain from the record of `generation`, even if that record or its parent is gone."""
    steps = _steps(listing)
    keys: list[str] = []
    up_to: int | None = None
    while True:
        record = listing.records.get(generation)
        parent = place_of(record.parent) if record is not None and record.parent is not None else None
        keys += _own(steps.get(generation, {}), above=parent[1] if parent else -1, up_to=up_to)
        if record is None:
            return Chain(tuple(keys), generation)
        if parent is None:
            return Chain(tuple(keys), 0)
        # A generation may save the very step it resumed from, and its successor may name that: each step once.
        generation, up_to = parent[0], parent[1] if up_to is None else min(parent[1], up_to - 1)


def latest_interventions(listing: Listing) -> Interventions:
    """Return the interventions that the highest readable record states."""
    if not listing.records:
        return Interventions()
    record = listing.records[max(listing.records)]
    return Interventions(record.skipped, record.slowed, record.rollbacks)


def rolled_back(listing: Listing) -> frozenset[str]:
    """Return the manifests that rollbacks left behind: of earlier generations, after the step returned to."""
    rollbacks = latest_interventions(listing).rollbacks
    return frozenset(
        key
        for key in listing.manifests
        for generation, step in (place_of(key),)
        if any(generation < rollback.generation and step > rollback.to_step for rollback in rollbacks)
    )


def known_corrupt(listing: Listing) -> frozenset[str]:
    """Return the manifests that any generation rejected: a corrupt checkpoint never becomes whole again."""
    return frozenset(key for record in listing.records.values() for key in record.rejected)


def may_resume_from(listing: Listing, parent: str | None, job_uid: str, state: MemoryState) -> bool:
    """Decide whether a generation with this parent may resume from a state in memory and stay in one history.

    The state must be the newest generation's own, or the very one that this generation resumed from, with no commit
    since; and `parent` must be in the chain, not after the state. See docs/decisions/0015.
    """
    record = listing.records.get(listing.highest)
    if record is None or record.job_uid != job_uid:
        return False
    if parent is None:
        committed_by, committed = 0, 0
    elif parent in checkpoint_chain(listing):
        committed_by, committed = place_of(parent)
    else:
        return False
    own = state.generation == record.generation and state.nonce == record.nonce
    named = state == record.resumed and committed_by < record.generation
    return (own or named) and state.step >= committed


def refuse_foreign_job(listing: Listing, job_uid: str, *, may_take_over: bool) -> None:
    """Raise PrefixTakenOver when the history is another job's and this generation may not take it over.

    Only a job's first generation may: otherwise the job that lost the prefix would take it back.
    """
    if may_take_over or not listing.records:
        return
    newest = listing.records[max(listing.records)]
    if newest.job_uid != job_uid:
        raise PrefixTakenOver(newest.generation, newest.job_uid)


def later_record(listing: Listing, generation: int) -> LaterRecord | None:
    """Return the highest record above `generation`, if there is one: the generation must stop."""
    readable = max((number for number in listing.records if number > generation), default=0)
    if readable:
        return LaterRecord(readable, listing.records[readable].job_uid)
    return LaterRecord(listing.highest, None) if listing.highest > generation else None


def place_of(key: str) -> tuple[int, int]:
    """Return the (generation, step) of a manifest's key."""
    place = parse_manifest_key(key)
    if place is None:
        raise ValueError(f"not a manifest's key: {key}")
    return place


def _own(steps: Mapping[int, str], *, above: int, up_to: int | None) -> list[str]:
    """Return a generation's part of a chain, newest first: after its parent's step, up to its successor's parent.

    The step that the successor names belongs to the part in any case.
    """
    chosen = [step for step in steps if step == up_to or (step > above and (up_to is None or step < up_to))]
    return [steps[step] for step in sorted(chosen, reverse=True)]


def _steps(listing: Listing) -> dict[int, dict[int, str]]:
    """Map generation to step to manifest key."""
    steps: dict[int, dict[int, str]] = {}
    for key in listing.manifests:
        generation, step = place_of(key)
        steps.setdefault(generation, {})[step] = key
    return steps
