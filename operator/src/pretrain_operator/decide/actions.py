"""Actions on a job's pods, agents and the job itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from pretrain_operator.cluster import Placement, Pod
from pretrain_operator.decide.lifecycle import EndReason


@dataclass(frozen=True)
class CreatePod:
    """Create a worker under an identity that was never used."""

    slot: int
    attempt: int
    placement: Placement = field(default_factory=Placement)


@dataclass(frozen=True)
class DeletePod:
    """Terminate a worker, or remove a terminated one."""

    pod: Pod
    grace_seconds: float


@dataclass(frozen=True)
class EndAgents:
    """Shut down all agents."""

    reason: EndReason
    message: str


@dataclass(frozen=True)
class DeleteJob:
    """Delete the job with everything it owns, after its TTL."""


Action = CreatePod | DeletePod | EndAgents | DeleteJob
