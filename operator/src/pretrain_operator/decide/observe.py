"""What there is of a job at one moment: pods joined with their agents, and what is known of pods that were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from pretrain_api.messages.profile_request import ProfileRequest
from pretrain_api.spec.job import PretrainJob
from pretrain_api.spec.replicas import down_to_unit, up_to_unit, worker_unit
from pretrain_api.status.job import GoodputState, JobStatus, Obstacle, SlotMemory, Suspect
from pretrain_operator.cluster import Pod, Snapshot
from pretrain_operator.coordinator.types import AgentView, CoordinatorView
from pretrain_operator.projections.budget import Spent

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
    joined: bool = False
    """Its agent was there once, to this operator or to one before."""
    heard: bool = False
    """Its agent speaks, so its node lives."""
    silent_seconds: float = 0.0
    """Since its agent was last heard of; 0 for one that never joined, or while no agent is heard at all."""
    absent_seconds: float = 0.0
    """The same whoever else is heard, as far as this operator was itself in order all the time."""
    starting_seconds: float = 0.0
    """For how long it is seen to run without having joined."""

    @property
    def identity(self) -> Identity:
        """What no other pod has or will have."""
        return self.pod.slot, self.pod.attempt


@dataclass(frozen=True)
class Refusal:
    """The cluster takes no more pods."""

    reason: str
    message: str
    times: int = 0
    """In a row."""
    retry_at: float = 0.0


Moments = Mapping[Identity, float]


def _no_moments() -> Moments:
    return MappingProxyType({})


@dataclass(frozen=True)
class History:
    """What the present moment doesn't show. `slots` outlives the operator by way of the status; the others do not."""

    slots: Mapping[int, SlotMemory] = field(default_factory=lambda: MappingProxyType({}))
    heard: Moments = field(default_factory=_no_moments)
    """When the agents of living pods were last heard of, of those that ever joined."""
    starting: Moments = field(default_factory=_no_moments)
    """Since when pods that have not joined are seen to run."""

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

    def created(self, slot: int, attempt: int, spec_generation: int, kept_from: Iterable[str] = ()) -> History:
        """A pod was created; what is known of that attempt already stays."""
        memory = _newer(self.slots.get(slot), slot, attempt)
        if memory.attempt == attempt:
            made = {"spec_generation": spec_generation, "kept_from": tuple(sorted(kept_from))}
            memory = memory.model_copy(update=made)
        return replace(self, slots={**self.slots, slot: memory})

    def advance(self, snapshot: Snapshot, view: CoordinatorView, now: float, *, running: bool) -> History:
        """This history and what the moment adds. Pods that end while the job is not `running` were ended on purpose."""
        agents = {(agent.slot, agent.attempt): agent for agent in view.agents}
        alive = {(pod.slot, pod.attempt) for pod in snapshot.pods if pod.alive}
        slots = dict(self.slots)
        for slot, attempt in sorted({(pod.slot, pod.attempt) for pod in snapshot.pods} | agents.keys()):
            slots[slot] = _newer(slots.get(slot), slot, attempt, snapshot.job.metadata.generation)
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
        begun = {(pod.slot, pod.attempt) for pod in snapshot.pods if pod.phase == "Running"}
        starting = {identity: self.starting.get(identity, now) for identity in begun - heard.keys()}
        return History(slots, heard, starting)

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
    suspects: tuple[Suspect, ...] = ()
    refusal: Refusal | None = None
    ranks_wait: Obstacle | None = None
    """What the ranks of the current generation wait for."""
    invalid: str = ""
    """What is wrong with the spec as it stands."""
    grace_seconds: float = 30.0
    """What a worker needs to end with a checkpoint."""
    profile: ProfileRequest | None = None
    """What the ranks are to record; None once that was answered."""
    stepped_at: float | None = None
    """Unix seconds of the last step; None: none was heard of yet."""
    sound_since: float = float("-inf")
    """Since when this operator is in order."""


def unit(job: PretrainJob) -> int:
    """Generations have multiples of so many members: those that hold whole replicas of the model."""
    return worker_unit(job.spec.training.parallelism, job.spec.workers.processes_per_worker or 1)


def fewest(job: PretrainJob) -> int:
    """Members that a generation has at least."""
    return up_to_unit(job.spec.workers.elastic.min, unit(job))


def wanted_replicas(job: PretrainJob) -> int:
    """Members that a generation should have."""
    workers = job.spec.workers
    return max(fewest(job), down_to_unit(min(workers.replicas, workers.max), unit(job)))


def wanted_slots(job: PretrainJob) -> range:
    """The slots that should have a living pod each."""
    return range(wanted_replicas(job) + job.spec.workers.spares)


def missing_slots(job: PretrainJob, workers: Iterable[Worker]) -> tuple[int, ...]:
    """The wanted slots that have none."""
    there = {worker.pod.slot for worker in workers if worker.pod.alive}
    return tuple(slot for slot in wanted_slots(job) if slot not in there)


def joined_workers(
    pods: Iterable[Pod], view: CoordinatorView, history: History, now: float, sound_since: float = float("-inf")
) -> tuple[Worker, ...]:
    """The pods with their agents, ordered by slot and attempt. `sound_since`: since when this operator is in order."""
    agents = {(agent.slot, agent.attempt): agent for agent in view.agents}
    members = {(member.slot, member.attempt) for member in view.current.members} if view.current else set[Identity]()
    speaking = {(agent.slot, agent.attempt) for agent in view.agents if now - agent.last_heard <= HEARD_SECONDS}
    workers: list[Worker] = []
    for pod in sorted(pods, key=lambda pod: (pod.slot, pod.attempt)):
        identity = (pod.slot, pod.attempt)
        heard = history.heard.get(identity, now)
        workers.append(
            Worker(
                pod=pod,
                agent=agents.get(identity),
                member=identity in members,
                joined=identity in history.heard,
                heard=identity in speaking,
                silent_seconds=max(0.0, now - heard) if speaking else 0.0,
                absent_seconds=max(0.0, now - max(heard, sound_since)),
                starting_seconds=now - history.starting.get(identity, now),
            )
        )
    return tuple(workers)


def _newer(memory: SlotMemory | None, slot: int, attempt: int, spec_generation: int | None = None) -> SlotMemory:
    if memory is not None and attempt <= memory.attempt:
        return memory
    failures, failed_at = (0, 0.0) if memory is None else (memory.failures, memory.failed_at)
    return SlotMemory(
        slot=slot, attempt=attempt, failures=failures, failed_at=failed_at, spec_generation=spec_generation
    )
