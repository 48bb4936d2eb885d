"""When a worker whose pod is still there is given up: its node is gone, it says nothing, or it never began."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import SlotMemory
from pretrain_operator.cluster import Placement
from pretrain_operator.decide.observe import HEARD_SECONDS, Worker

LOST_AGENT_SECONDS = 5.0
"""A worker whose agent is in no generation and was not heard for so long is replaced, its pod alive or not."""
RETURN_SECONDS = 10.0
"""The same for agents that a new operator has not heard yet: they come back one by one, with back-off."""
ALONE_SECONDS = 30.0
"""The only worker of a job is given up after so long: nobody else could prove that the silence is its own."""
START_SECONDS = 120.0
"""From the start of a worker to its agent's hello, image and data not counted."""
UNPLACED_SECONDS = 150.0
"""A pod of which nobody knows any more where it must not go is made anew once if it finds no place for so long."""
NEVER = float("inf")


@dataclass(frozen=True)
class Patience:
    """How much longer a worker is waited for."""

    seconds: float = NEVER
    """0 or less: it is lost."""
    failed: bool = False
    """It is its own fault: its attempt counts as one that failed, and the next one waits for its end."""

    @property
    def over(self) -> bool:
        """It is lost."""
        return self.seconds <= 0


def patience(worker: Worker, *, alone: bool) -> Patience:
    """How long this living worker is still waited for. `alone`: no other worker has joined."""
    waits = [_silent(worker), _on_a_dead_node(worker)]
    if alone and worker.joined:
        waits.append(ALONE_SECONDS - worker.absent_seconds)
    start = _starting(worker)
    if start < min(waits):
        return Patience(start, failed=True)
    return Patience(min(waits))


def is_alone(workers: Iterable[Worker]) -> bool:
    """At most one living worker has ever joined."""
    return sum(worker.joined and worker.pod.alive for worker in workers) <= 1


def fell_silent(worker: Worker, *, alone: bool) -> bool:
    """It is lost because nothing is heard from where it is."""
    left = patience(worker, alone=alone)
    return worker.pod.alive and left.over and not left.failed


def made_in_vain(worker: Worker, memory: SlotMemory | None, job: PretrainJob, placement: Placement, now: float) -> bool:
    """A pod that cannot start as it was made, and would be made otherwise now: nothing of it has begun."""
    pod = worker.pod
    if pod.phase != "Pending" or not pod.reason or memory is None or memory.attempt != pod.attempt:
        return False
    if memory.spec_generation is not None and memory.spec_generation != job.metadata.generation:
        return True
    if pod.node or pod.reason != "Unschedulable":
        return False
    if memory.kept_from is None:
        return now - pod.created_at >= UNPLACED_SECONDS
    return not placement.never.issuperset(memory.kept_from)


def _silent(worker: Worker) -> float:
    """Out of the generation and heard no more, while others are heard."""
    if worker.member or worker.silent_seconds <= 0:
        return NEVER
    if worker.pod.node_ready is False:
        return HEARD_SECONDS - worker.silent_seconds
    return (RETURN_SECONDS if worker.agent is None else LOST_AGENT_SECONDS) - worker.silent_seconds


def _on_a_dead_node(worker: Worker) -> float:
    if worker.pod.node_ready is not False:
        return NEVER
    return RETURN_SECONDS - worker.absent_seconds if worker.joined else 0.0


def _starting(worker: Worker) -> float:
    pod = worker.pod
    if worker.joined or pod.phase != "Running" or pod.reason or pod.deleting:
        return NEVER
    return START_SECONDS - worker.starting_seconds
