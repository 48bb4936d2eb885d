"""Workers as `decide` sees them: pods joined with their agents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pretrain_operator.cluster import Pod
from pretrain_operator.coordinator.types import AgentView, CoordinatorView
from pretrain_operator.decide.pod_history import Identity, PodHistory
from pretrain_operator.liveness.silence import SilenceClock
from pretrain_operator.liveness.timings import TIMINGS


@dataclass(frozen=True)
class ObservedWorker:
    """A pod and its agent, if one is known."""

    pod: Pod
    agent: AgentView | None = None
    member: bool = False
    """It belongs to the current generation."""
    joined: bool = False
    """Its agent has joined, at this operator or an earlier one."""
    heard: bool = False
    """Its agent is heard, so its node is alive."""
    silent_seconds: float = 0.0
    """Silence of its agent; 0 if it never joined, or while no agent is heard at all."""
    absent_seconds: float = 0.0
    """Silence of its agent within this operator's uninterrupted operation, whoever else is heard."""
    starting_seconds: float = 0.0
    """Time as a running pod whose agent has not joined."""

    @property
    def identity(self) -> Identity:
        """(slot, attempt), which no other pod of the job has or will have."""
        return self.pod.slot, self.pod.attempt


def is_alone(workers: Iterable[ObservedWorker]) -> bool:
    """Return whether at most one live worker has ever joined."""
    return sum(worker.joined and worker.pod.alive for worker in workers) <= 1


def observed_workers(
    pods: Iterable[Pod], view: CoordinatorView, history: PodHistory, clock: SilenceClock, now: float
) -> tuple[ObservedWorker, ...]:
    """Join the pods with their agents, ordered by slot and attempt."""
    agents = {(agent.slot, agent.attempt): agent for agent in view.agents}
    members = {(member.slot, member.attempt) for member in view.current.members} if view.current else set[Identity]()
    clock = clock.hearing(max((agent.last_heard for agent in view.agents), default=None))
    return tuple(
        _observed_worker(pod, agents.get((pod.slot, pod.attempt)), members, history, clock, now)
        for pod in sorted(pods, key=lambda pod: (pod.slot, pod.attempt))
    )


def _observed_worker(
    pod: Pod,
    agent: AgentView | None,
    members: set[Identity],
    history: PodHistory,
    clock: SilenceClock,
    now: float,
) -> ObservedWorker:
    identity = (pod.slot, pod.attempt)
    last_heard = history.heard.get(identity, now)
    return ObservedWorker(
        pod=pod,
        agent=agent,
        member=identity in members,
        joined=identity in history.heard,
        heard=agent is not None and now - agent.last_heard <= TIMINGS.heard_within,
        silent_seconds=clock.silence(last_heard, now, TIMINGS.heard_within),
        absent_seconds=clock.absence(last_heard, now),
        starting_seconds=now - history.starting.get(identity, now),
    )
