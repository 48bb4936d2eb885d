"""What there is of a job at one moment: pods joined with their agents, and what is known of pods that were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from pretrain_api.runreport import GoodputState, JobStatus, SlotMemory
from pretrain_operator.budget import Spent
from pretrain_operator.cluster import Pod, Snapshot
from pretrain_operator.coordinator.types import AgentView, CoordinatorView

Identity = tuple[int, int]
"""(slot, attempt)"""
NOTHING_SPENT = Spent()
HEARD_SECONDS = 2.0
"""With no agent heard for so long the silence is the operator's own, and says nothing of any worker."""


@dataclass(frozen=True)
class Worker:
    """A pod, and its agent where one is known."""

    pod: Pod
    agent: AgentView | None = None
    member: bool = False
    """Of the current generation."""
    silent_seconds: float = 0.0
    """Since its agent was last heard of; 0 for one that never joined, or while no agent is heard at all."""

    @property
    def identity(self) -> Identity:
        """What no other pod has or will have."""
        return self.pod.slot, self.pod.attempt


@dataclass(frozen=True)
class History:
    """What the present moment doesn't show. `slots` outlives the operator by way of the status; `heard` does not."""

    slots: Mapping[int, SlotMemory] = field(default_factory=lambda: MappingProxyType({}))
    heard: Mapping[Identity, float] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, status: JobStatus) -> History:
        """What the last operator wrote down."""
        return cls({memory.slot: memory for memory in status.bookkeeping.slots})

    def next_attempt(self, slot: int) -> int:
        """An attempt that was never used."""
        memory = self.slots.get(slot)
        return 0 if memory is None else memory.attempt + 1

    def joined(self, slot: int, attempt: int) -> bool:
        """The agent of this attempt was there, or a later one's."""
        memory = self.slots.get(slot)
        return memory is not None and (memory.attempt > attempt or memory.joined)

    def created(self, slot: int, attempt: int) -> History:
        """A pod was created; what is known of that attempt already stays."""
        return History({**self.slots, slot: _newer(self.slots.get(slot), slot, attempt)}, self.heard)

    def advance(self, snapshot: Snapshot, view: CoordinatorView, now: float, *, running: bool) -> History:
        """This history and what the moment adds. Pods that end while the job is not `running` were ended on purpose."""
        agents = {(agent.slot, agent.attempt): agent for agent in view.agents}
        alive = {(pod.slot, pod.attempt) for pod in snapshot.pods if pod.alive}
        slots = dict(self.slots)
        for slot, attempt in sorted({(pod.slot, pod.attempt) for pod in snapshot.pods} | agents.keys()):
            slots[slot] = _newer(slots.get(slot), slot, attempt)
        for slot, memory in slots.items():
            identity = (slot, memory.attempt)
            if identity in agents and not memory.joined:
                slots[slot] = memory.model_copy(update={"joined": True, "failures": 0})
            elif identity not in alive and not memory.joined and not memory.counted:
                failure = {"failures": memory.failures + 1, "failed_at": now} if running else {}
                slots[slot] = memory.model_copy(update={"counted": True, **failure})
        heard = {
            (slot, memory.attempt): agents[slot, memory.attempt].last_heard
            if (slot, memory.attempt) in agents
            else self.heard.get((slot, memory.attempt), now)
            for slot, memory in slots.items()
            if memory.joined and (slot, memory.attempt) in alive
        }
        return History(slots, heard)

    def failures_since(self, before: History) -> tuple[Identity, ...]:
        """The attempts that ended before they joined and that `before` had not counted."""
        return tuple(
            (slot, memory.attempt)
            for slot, memory in sorted(self.slots.items())
            if memory.failures > (before.slots[slot].failures if slot in before.slots else 0)
        )


@dataclass(frozen=True)
class Observed:
    """All that `plan` decides on."""

    workers: tuple[Worker, ...]
    """Ordered by slot and attempt."""
    view: CoordinatorView
    written: JobStatus
    """The status as last written."""
    history: History
    state: GoodputState = "queued"
    recovering: str = ""
    """The cause of the newest fault that is not overcome yet."""
    spent: Spent = NOTHING_SPENT
    fatal: str = ""
    stopping: bool = False


def joined_workers(pods: Iterable[Pod], view: CoordinatorView, history: History, now: float) -> tuple[Worker, ...]:
    """The pods with their agents, ordered by slot and attempt."""
    agents = {(agent.slot, agent.attempt): agent for agent in view.agents}
    members = {(member.slot, member.attempt) for member in view.current.members} if view.current else set[Identity]()
    somebody = any(now - agent.last_heard <= HEARD_SECONDS for agent in view.agents)
    workers: list[Worker] = []
    for pod in sorted(pods, key=lambda pod: (pod.slot, pod.attempt)):
        identity = (pod.slot, pod.attempt)
        silent = max(0.0, now - history.heard.get(identity, now)) if somebody else 0.0
        workers.append(Worker(pod, agents.get(identity), identity in members, silent))
    return tuple(workers)


def _newer(memory: SlotMemory | None, slot: int, attempt: int) -> SlotMemory:
    if memory is None:
        return SlotMemory(slot=slot, attempt=attempt)
    if attempt <= memory.attempt:
        return memory
    return memory.model_copy(update={"attempt": attempt, "joined": False, "counted": False})
