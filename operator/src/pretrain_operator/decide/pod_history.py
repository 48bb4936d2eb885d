"""History of a job's pods: the facts about attempts that the current snapshot does not show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from pretrain_api.status.job import JobStatus, SlotMemory
from pretrain_operator.cluster import Snapshot
from pretrain_operator.coordinator.types import CoordinatorView

Identity = tuple[int, int]
"""(slot, attempt)"""
Moments = Mapping[Identity, float]


def _no_moments() -> Moments:
    return MappingProxyType({})


@dataclass(frozen=True)
class PodHistory:
    """Attempts per slot, last messages and start times. Only `slots` is stored in the status."""

    slots: Mapping[int, SlotMemory] = field(default_factory=lambda: MappingProxyType({}))
    heard: Moments = field(default_factory=_no_moments)
    """Last message of each live pod whose agent has joined."""
    starting: Moments = field(default_factory=_no_moments)
    """First observation as running of each pod whose agent has not joined."""

    @classmethod
    def of(cls, status: JobStatus) -> PodHistory:
        """Restore the history from the status of an earlier operator."""
        return cls({memory.slot: memory for memory in status.bookkeeping.slots})

    def next_attempt(self, slot: int) -> int:
        """Return an attempt number that was never used."""
        memory = self.slots.get(slot)
        return 0 if memory is None else memory.attempt + 1

    def joined(self, slot: int, attempt: int) -> bool:
        """Return whether the agent of this attempt, or of a later one, has joined."""
        memory = self.slots.get(slot)
        return memory is not None and (memory.attempt > attempt or memory.joined)

    def created(self, slot: int, attempt: int, spec_generation: int, kept_from: Iterable[str] = ()) -> PodHistory:
        """Record a created pod; existing records of that attempt stay."""
        memory = _newer(self.slots.get(slot), slot, attempt)
        if memory.attempt == attempt:
            made = {"spec_generation": spec_generation, "kept_from": tuple(sorted(kept_from))}
            memory = memory.model_copy(update=made)
        return replace(self, slots={**self.slots, slot: memory})

    def advance(self, snapshot: Snapshot, view: CoordinatorView, now: float, *, running: bool) -> PodHistory:
        """Add an observation. Pods that end while the job is not `running` ended on purpose."""
        agents = {(agent.slot, agent.attempt): agent.last_heard for agent in view.agents}
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
        newest = {(slot, memory.attempt) for slot, memory in slots.items() if memory.joined}
        heard = {identity: agents.get(identity, self.heard.get(identity, now)) for identity in newest & alive}
        begun = {(pod.slot, pod.attempt) for pod in snapshot.pods if pod.phase == "Running"}
        starting = {identity: self.starting.get(identity, now) for identity in begun - heard.keys()}
        return PodHistory(slots, heard, starting)

    def failures_since(self, before: PodHistory) -> tuple[Identity, ...]:
        """Return the attempts that ended before they joined and that `before` had not counted."""
        return tuple(
            (slot, memory.attempt)
            for slot, memory in sorted(self.slots.items())
            if memory.failures > (before.slots[slot].failures if slot in before.slots else 0)
        )


def _newer(memory: SlotMemory | None, slot: int, attempt: int, spec_generation: int | None = None) -> SlotMemory:
    if memory is not None and attempt <= memory.attempt:
        return memory
    failures, failed_at = (0, 0.0) if memory is None else (memory.failures, memory.failed_at)
    return SlotMemory(
        slot=slot, attempt=attempt, failures=failures, failed_at=failed_at, spec_generation=spec_generation
    )
