"""Replacement of workers whose pod still exists: it cannot start as created, or its agent or its node is lost.

Each policy returns the deadline of one reason for replacement, or None if the reason does not apply. The first expired
deadline in the chain decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import SlotMemory
from pretrain_operator.cluster import Placement
from pretrain_operator.decide.workers import ObservedWorker
from pretrain_operator.liveness.timings import TIMINGS


@dataclass(frozen=True)
class ReplacementDeadline:
    """The time left until a worker is replaced for one reason."""

    seconds_left: float
    reason: str
    message: str
    failed: bool = False
    """The attempt counts as failed: the next one waits for the end of its pod and for the backoff."""

    @property
    def expired(self) -> bool:
        """The worker is lost."""
        return self.seconds_left <= 0


ReplacementPolicy = Callable[[ObservedWorker, bool], ReplacementDeadline | None]
"""(worker, whether no other worker has joined) -> deadline."""


def start_timeout(worker: ObservedWorker, _alone: bool) -> ReplacementDeadline | None:
    """Limit the time of a running pod until its agent joins."""
    pod = worker.pod
    if worker.joined or pod.phase != "Running" or pod.reason or pod.deleting:
        return None
    left = TIMINGS.start - worker.starting_seconds
    message = f"its agent did not join within {TIMINGS.start:.0f} s"
    return ReplacementDeadline(left, "StartTimedOut", message, failed=True)


def agent_lost(worker: ObservedWorker, _alone: bool) -> ReplacementDeadline | None:
    """Limit the silence of an agent outside the generation while other agents are heard."""
    if worker.member or worker.silent_seconds <= 0:
        return None
    if worker.pod.node_ready is False:
        allowance = TIMINGS.heard_within
    else:
        allowance = TIMINGS.agent_return if worker.agent is None else TIMINGS.lost_agent
    message = f"its agent was not heard for {worker.silent_seconds:.0f} s"
    return ReplacementDeadline(allowance - worker.silent_seconds, "AgentLost", message)


def node_lost(worker: ObservedWorker, _alone: bool) -> ReplacementDeadline | None:
    """Limit the absence of an agent whose node is not ready; without an agent the pod is replaced at once."""
    if worker.pod.node_ready is not False:
        return None
    left = TIMINGS.agent_return - worker.absent_seconds if worker.joined else 0.0
    return ReplacementDeadline(left, "NodeLost", f"node {worker.pod.node} is not ready")


def lone_agent_lost(worker: ObservedWorker, alone: bool) -> ReplacementDeadline | None:
    """Limit the absence of the job's only agent, whose silence no other agent can prove."""
    if not alone or not worker.joined:
        return None
    message = f"the job's only agent was not heard for {worker.absent_seconds:.0f} s"
    return ReplacementDeadline(TIMINGS.alone - worker.absent_seconds, "AgentLost", message)


POLICIES: tuple[ReplacementPolicy, ...] = (start_timeout, agent_lost, node_lost, lone_agent_lost)


def deadlines(worker: ObservedWorker, *, alone: bool) -> tuple[ReplacementDeadline, ...]:
    """Return the deadlines that apply to a live worker, in the chain's order."""
    return tuple(deadline for policy in POLICIES if (deadline := policy(worker, alone)) is not None)


def expired_deadline(worker: ObservedWorker, *, alone: bool) -> ReplacementDeadline | None:
    """Return the first expired deadline; None: the worker is kept."""
    return next((deadline for deadline in deadlines(worker, alone=alone) if deadline.expired), None)


def fell_silent(worker: ObservedWorker, *, alone: bool) -> bool:
    """Return whether a live worker is lost because its node is silent or not ready."""
    lost = expired_deadline(worker, alone=alone)
    return worker.pod.alive and lost is not None and not lost.failed


def is_outdated(
    worker: ObservedWorker, memory: SlotMemory | None, job: PretrainJob, placement: Placement, now: float
) -> bool:
    """Return whether a pending pod cannot start as created and would be created differently now."""
    pod = worker.pod
    if pod.phase != "Pending" or not pod.reason or memory is None or memory.attempt != pod.attempt:
        return False
    if memory.spec_generation is not None and memory.spec_generation != job.metadata.generation:
        return True
    if pod.node or pod.reason != "Unschedulable":
        return False
    if memory.kept_from is None:
        return now - pod.created_at >= TIMINGS.unplaced
    return not placement.never.issuperset(memory.kept_from)
