"""Placement of new workers: evidence from pods against nodes, and which nodes to avoid."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator

from pretrain_api.messages.trainer_config import ExitCode
from pretrain_api.status.job import NodeFailure
from pretrain_operator.cluster import Placement, Pod
from pretrain_operator.decide.observe import Worker
from pretrain_operator.projections.suspects import EXCLUDED_SECONDS, Suspects

CRASHES = ("Error", "Killed", "OOMKilled", "StartError", "ContainerCannotRun")
"""Reasons of pods that ended by themselves and not because somebody wanted their place."""
BLAMELESS = (ExitCode.INVALID, -signal.SIGTERM, 128 + signal.SIGTERM)
"""Exit codes that say nothing of the node: bad input, and an end on request."""


def crashes(pods: Iterable[Pod]) -> Iterator[tuple[str, NodeFailure]]:
    """The workers that crashed or ran out of memory, each with its node. The same pod gives the same failure again."""
    for pod in pods:
        ended_by_itself = pod.phase == "Failed" and not pod.deleting and pod.reason in CRASHES
        if ended_by_itself and pod.exit_code not in BLAMELESS:
            yield pod.node, NodeFailure(time=pod.finished_at or pod.created_at, cause=pod.reason)


def silent_nodes(lost: Iterable[Worker], workers: Iterable[Worker]) -> frozenset[str]:
    """The nodes of workers that were lost by silence, but for those from which others still speak."""
    return frozenset(worker.pod.node for worker in lost) - _heard_nodes(workers)


def placement(suspects: Suspects, workers: Iterable[Worker], grace_seconds: float, now: float) -> Placement:
    """Where new workers should go. Nodes are never excluded if no other node is known: that could wedge the job."""
    workers = tuple(workers)
    silent = {
        suspect.node
        for suspect in suspects
        if suspect.silent_at is not None and now - suspect.silent_at < EXCLUDED_SECONDS
    }
    dead = silent - _heard_nodes(workers) | {worker.pod.node for worker in workers if worker.pod.node_ready is False}
    known = {worker.pod.node for worker in workers} | {suspect.node for suspect in suspects}
    dead, known = dead - {""}, known - {""}
    avoided = {suspect.node for suspect in suspects if suspect.avoided}
    if known <= dead:
        return Placement(frozenset(), frozenset(avoided | dead), grace_seconds)
    return Placement(frozenset(dead), frozenset(avoided - dead), grace_seconds)


def next_release(suspects: Suspects, now: float) -> float | None:
    """Seconds until the next of the excluded nodes is free again; None: none is excluded by silence."""
    ends = (suspect.silent_at + EXCLUDED_SECONDS - now for suspect in suspects if suspect.silent_at is not None)
    return min((end for end in ends if end > 0), default=None)


def _heard_nodes(workers: Iterable[Worker]) -> frozenset[str]:
    return frozenset(worker.pod.node for worker in workers if worker.heard)
