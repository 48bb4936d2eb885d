"""Projection of suspect nodes: evidence against each node, and for how long it counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pretrain_api.messages.reports import Failed
from pretrain_api.spec import job as spec
from pretrain_api.status.job import JobStatus, NodeFailure, Suspect
from pretrain_operator.facts.fact import GenerationEnded, NodesObserved
from pretrain_operator.liveness.timings import TIMINGS
from pretrain_operator.projections.budget import action_on, decisive
from pretrain_operator.projections.projection import NO_EFFECTS, Context, Effects, Projection, on

MAX_SUSPECTS = 50
MAX_FAILURES = 20
"""Kept in the status, the newest ones."""
SILENT = "WorkerSilent"

Suspects = tuple[Suspect, ...]


@dataclass(frozen=True)
class SuspectSlice:
    """Slice of the status: suspect nodes."""

    suspects: Suspects = ()
    judged: Suspects = ()
    """As last judged: time alone changes nothing."""


Folded = tuple[SuspectSlice, Effects]


def restore(status: JobStatus) -> SuspectSlice:
    """Read the slice."""
    return SuspectSlice(status.suspects, status.suspects)


def write(slice_: SuspectSlice, status: JobStatus) -> JobStatus:
    """Return the status with the slice in it."""
    return status.model_copy(update={"suspects": slice_.suspects})


def nodes_observed(slice_: SuspectSlice, fact: NodesObserved, context: Context) -> Folded:
    """Add evidence, and judge all of it if any is new. A crash that is known changes nothing."""
    suspects = slice_.suspects
    for node, failure in fact.crashes:
        suspects = with_failure(suspects, node, failure)
    for node in sorted(fact.silent):
        suspects = with_silence(suspects, node, fact.time)
    if suspects == slice_.judged:
        return replace(slice_, suspects=suspects), NO_EFFECTS
    suspects = judged(suspects, context.recovery.suspects, fact.time)
    return SuspectSlice(suspects, suspects), NO_EFFECTS


def ended(slice_: SuspectSlice, fact: GenerationEnded, context: Context) -> Folded:
    """Blame the node of a worker that fell silent, or whose ranks were killed from outside the job."""
    suspects = slice_.suspects
    if context.state == "suspended":
        return slice_, NO_EFFECTS
    if fact.cause == SILENT:
        suspects = with_silence(suspects, fact.node, fact.time)
        suspects = with_failure(suspects, fact.node, NodeFailure(time=fact.time, cause=SILENT))
    elif fact.cause == "RankFailed" and any(failure.exit_code < 0 for failure in decisive(context.failures)):
        suspects = with_failure(suspects, fact.node, NodeFailure(time=fact.time, cause="Killed"))
    return replace(slice_, suspects=suspects), NO_EFFECTS


def failed(slice_: SuspectSlice, body: Failed, context: Context) -> Folded:
    """Quarantine the node if a rule of the job demands it."""
    if action_on(body, context.recovery.rules) != "Quarantine":
        return slice_, NO_EFFECTS
    node = context.membership.node_of(context.generation, context.slot)
    return replace(slice_, suspects=with_quarantine(slice_.suspects, node, context.time)), NO_EFFECTS


def with_failure(suspects: Suspects, node: str, failure: NodeFailure) -> Suspects:
    """Add a failure on a node; a known one changes nothing."""
    before = _find(suspects, node)
    if failure in before.failures:
        return suspects
    failures = sorted((*before.failures, failure), key=lambda known: known.time)[-MAX_FAILURES:]
    return _put(suspects, before.model_copy(update={"failures": tuple(failures)}))


def with_silence(suspects: Suspects, node: str, time: float) -> Suspects:
    """Note that no agent on the node is heard. Repeated evidence counts from the first time until it expires."""
    before = _find(suspects, node)
    if before.silent_at is not None and time - before.silent_at < TIMINGS.node_excluded:
        return suspects
    return _put(suspects, before.model_copy(update={"silent_at": time}))


def with_quarantine(suspects: Suspects, node: str, time: float) -> Suspects:
    """Quarantine a node."""
    return _put(suspects, _find(suspects, node).model_copy(update={"quarantined_at": time}))


def judged(suspects: Suspects, rule: spec.Suspects, now: float) -> Suspects:
    """Drop expired evidence and decide which nodes to avoid."""
    recent = [_recent(suspect, now - rule.window.total_seconds(), now) for suspect in suspects]
    recent = [suspect for suspect in recent if suspect.failures or suspect.silent_at or suspect.quarantined_at]
    return tuple(
        suspect.model_copy(
            update={"avoided": suspect.quarantined_at is not None or _blamed(suspect, recent) >= rule.failures}
        )
        for suspect in recent
    )


def _blamed(suspect: Suspect, suspects: Iterable[Suspect]) -> int:
    """Count the failures that count against the node. A crash that other nodes see as often is the program's own."""
    others = [Counter(known.cause for known in other.failures) for other in suspects if other is not suspect]
    own = Counter(failure.cause for failure in suspect.failures)
    return sum(
        count
        for cause, count in own.items()
        if cause == SILENT or count > max((other[cause] for other in others), default=0)
    )


def _recent(suspect: Suspect, since: float, now: float) -> Suspect:
    silent, quarantined = suspect.silent_at, suspect.quarantined_at
    return suspect.model_copy(
        update={
            "failures": tuple(failure for failure in suspect.failures if failure.time > since),
            "silent_at": silent if silent is not None and now - silent < TIMINGS.node_excluded else None,
            "quarantined_at": quarantined if quarantined is not None and quarantined > since else None,
        }
    )


def _find(suspects: Suspects, node: str) -> Suspect:
    return next((suspect for suspect in suspects if suspect.node == node), Suspect(node=node))


def _put(suspects: Suspects, changed: Suspect) -> Suspects:
    if not changed.node:
        return suspects  # the node of the worker is unknown
    others = tuple(suspect for suspect in suspects if suspect.node != changed.node)
    return (*others, changed)[-MAX_SUSPECTS:]


SUSPECTS = Projection(
    name="suspects",
    restore=restore,
    write=write,
    rules=(on(NodesObserved, nodes_observed), on(GenerationEnded, ended), on(Failed, failed)),
)
