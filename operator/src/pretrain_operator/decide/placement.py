"""Placement of new pods: evidence against nodes from pods, excluded and avoided nodes."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator

from pretrain_api.messages.trainer_config import ExitCode
from pretrain_api.status.job import NodeFailure, Suspect
from pretrain_operator.cluster import Placement, Pod
from pretrain_operator.decide.workers import ObservedWorker
from pretrain_operator.liveness.timings import TIMINGS

CRASHES = ("Error", "Killed", "OOMKilled", "StartError", "ContainerCannotRun")
"""Reasons of pods that ended by themselves; others were preempted or evicted."""
BLAMELESS = (ExitCode.INVALID, -signal.SIGTERM, 128 + signal.SIGTERM)
"""Exit codes that are no evidence against the node: bad input, and an end on request."""


def crashes(pods: Iterable[Pod]) -> Iterator[tuple[str, NodeFailure]]:
    """Yield the node of each worker that crashed or ran out of memory; the same pod yields the same failure again."""
    for pod in pods:
        ended_by_itself = pod.phase == "Failed" and not pod.deleting and pod.reason in CRASHES
        if ended_by_itself and pod.exit_code not in BLAMELESS:
            yield pod.node, NodeFailure(time=pod.finished_at or pod.created_at, cause=pod.reason)


def silent_nodes(lost: Iterable[ObservedWorker], workers: Iterable[ObservedWorker]) -> frozenset[str]:
    """Return the nodes of workers lost by silence, except nodes from which other agents are heard."""
    return frozenset(worker.pod.node for worker in lost) - _heard_nodes(workers)


def placement(
    suspects: Iterable[Suspect], workers: Iterable[ObservedWorker], grace_seconds: float, now: float
) -> Placement:
    """Return where new pods may run. Without any other known node no node is excluded: that could block the job."""
    suspects, workers = tuple(suspects), tuple(workers)
    silent = {suspect.node for suspect in suspects if _excluded_seconds(suspect, now) > 0}
    dead = silent - _heard_nodes(workers) | {worker.pod.node for worker in workers if worker.pod.node_ready is False}
    known = {worker.pod.node for worker in workers} | {suspect.node for suspect in suspects}
    dead, known = dead - {""}, known - {""}
    avoided = {suspect.node for suspect in suspects if suspect.avoided}
    if known <= dead:
        return Placement(frozenset(), frozenset(avoided | dead), grace_seconds)
    return Placement(frozenset(dead), frozenset(avoided - dead), grace_seconds)


def next_release(suspects: Iterable[Suspect], now: float) -> float | None:
    """Seconds until the next silent node may be used again; None: no node is excluded by silence."""
    ends = (_excluded_seconds(suspect, now) for suspect in suspects)
    return min((end for end in ends if end > 0), default=None)


def _excluded_seconds(suspect: Suspect, now: float) -> float:
    """Seconds for which silence still excludes the node; 0 or less: it does not."""
    return 0.0 if suspect.silent_at is None else suspect.silent_at + TIMINGS.node_excluded - now


def _heard_nodes(workers: Iterable[ObservedWorker]) -> frozenset[str]:
    return frozenset(worker.pod.node for worker in workers if worker.heard)
