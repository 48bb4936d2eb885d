"""Wire protocol between agents and the coordinator: JSON messages over one WebSocket per agent.

Messages form a union discriminated by `kind`. Unknown fields are ignored; the coordinator answers an unknown kind with
`Error`, the agent drops it. Messages of the coordinator carry its operator's epoch; agents refuse an epoch lower than
the highest one received.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from pretrain_api.base import Wire
from pretrain_api.bounds import (
    Attempt,
    Count,
    Epoch,
    Name,
    Number,
    Pid,
    Port,
    Processes,
    Rank,
    Seconds,
    Slot,
    Step,
    Text,
    UnixTime,
)  # fmt: skip
from pretrain_api.messages.reports import ReportBody

PROTOCOL_VERSION = 1


class Member(Wire):
    """Place of an agent in a generation. `rank` is the agent's rank (torchrun's group rank), not a process's."""

    rank: Rank
    agent_id: Name
    slot: Slot
    attempt: Attempt
    host: Name
    node: Name = ""
    processes: Processes = 1


class Generation(Wire):
    """Fixed set of workers that train together. Members are ordered by rank: 0..n-1."""

    number: Number = Field(ge=1)
    job_uid: Name
    members: tuple[Member, ...]
    store_host: Name
    store_port: Port
    reason: Name = Field(description="Reason for forming it: `Started`, `WorkerLost`, `WorkerJoined`, `Resized`, …")
    rejected: tuple[str, ...] = Field(
        default=(), description="Keys of manifests that ranks found corrupt: never restored"
    )
    may_take_over: bool = Field(
        default=False,
        description="True for the job's first generation, which may take over a prefix of the same identity",
    )

    @property
    def world_size(self) -> int:
        """Number of training processes."""
        return sum(member.processes for member in self.members)


# --- agent to coordinator ---------------------------------------------------------------------------------------------


class Hello(Wire):
    """First message on every connection: identifies the agent and rebuilds the state of a restarted coordinator."""

    kind: Literal["hello"] = "hello"
    version: int = PROTOCOL_VERSION
    job_uid: Name
    slot: Slot
    attempt: Attempt
    agent_id: Name = Field(description="Random id of the agent process")
    host: Name = Field(description="Address at which the other workers reach this one")
    node: Name = ""
    pid: Pid = 0
    processes: Processes = Field(default=1, description="Training processes that this agent starts")
    generation: Generation | None = Field(default=None, description="Generation whose ranks run here now")
    highest_number: Number = Field(default=0, description="Highest generation number that this agent has seen")
    rolled_to: Number = Field(
        default=0, description="Number that the ranks of `generation` took by a rollback; 0: none"
    )
    highest_epoch: Epoch = 0
    step: Step = Field(default=0, description="Steps completed, as reported by this agent's ranks")
    stepped_seconds: Seconds | None = Field(
        default=None, description="Seconds since its ranks completed a step; null: none yet in this generation"
    )
    step_seconds: Seconds = Field(default=0.0, description="Duration of the last step as the agent saw it; 0: unknown")
    leaving: bool = Field(default=False, description="SIGTERM was received: the agent leaves at the next step boundary")


class StoreReady(Wire):
    """The TCPStore requested by HostStore is listening."""

    kind: Literal["store_ready"] = "store_ready"
    number: Number
    port: Port


class Report(Wire):
    """Report of a rank. `seq` counts from 1 for each agent id, without gaps; replayed until acknowledged."""

    kind: Literal["report"] = "report"
    seq: int = Field(ge=1)
    generation: Number = Field(description="Generation of the rank")
    time: UnixTime = Field(description="Unix seconds at which the agent received it")
    body: ReportBody


class Heartbeat(Wire):
    """Sent after HEARTBEAT_SECONDS without another message; carries the latest step as evidence of progress."""

    kind: Literal["heartbeat"] = "heartbeat"
    generation: Number = 0
    step: Step = 0


class Leaving(Wire):
    """SIGTERM was received and a checkpoint is taken at the next step boundary.

    `final`: the ranks hold or have exited, and the agent exits next.
    """

    kind: Literal["leaving"] = "leaving"
    final: bool = False
    reason: Name = "SIGTERM"


AgentMessage = Annotated[Hello | StoreReady | Report | Heartbeat | Leaving, Field(discriminator="kind")]
AGENT_MESSAGE: TypeAdapter[AgentMessage] = TypeAdapter(AgentMessage)

HEARTBEAT_SECONDS = 0.25


# --- coordinator to agent ---------------------------------------------------------------------------------------------


class Joined(Wire):
    """Response to Hello: the agent is admitted. Reports up to `acked_seq` are acknowledged."""

    kind: Literal["joined"] = "joined"
    epoch: Epoch = 0
    acked_seq: Count = 0


class HostStore(Wire):
    """Request to the future rank-0 agent to host a TCPStore for this generation only."""

    kind: Literal["host_store"] = "host_store"
    epoch: Epoch = 0
    number: Number


class Formed(Wire):
    """Generation to join now. The agent kills ranks of any other generation."""

    kind: Literal["generation"] = "generation"
    epoch: Epoch = 0
    generation: Generation


class Dissolved(Wire):
    """The generation ended and no next one can be formed yet: the agent kills its ranks and waits."""

    kind: Literal["dissolved"] = "dissolved"
    epoch: Epoch = 0
    number: Number
    reason: Name


class Command(Wire):
    """Command to the ranks, forwarded unchanged. All ranks agree on the step boundary that carries it out.

    `checkpoint`: save, then hold for `hold_seconds` (0: continue at once) or until the generation ends. `profile`: rank
    `rank` records the next `steps` steps and uploads the trace to the store without blocking training.
    """

    kind: Literal["command"] = "command"
    epoch: Epoch = 0
    id: Name
    generation: Number
    action: Literal["checkpoint", "profile"] = "checkpoint"
    hold_seconds: Seconds = 0.0
    steps: Step = 0
    rank: Rank = 0


class Acked(Wire):
    """Reports up to and including `seq` are acknowledged; the agent may drop them."""

    kind: Literal["acked"] = "acked"
    epoch: Epoch = 0
    seq: Count


class Shutdown(Wire):
    """Request to kill the ranks and exit. `superseded`: a later attempt of this slot joined, or the pod is unknown."""

    kind: Literal["shutdown"] = "shutdown"
    epoch: Epoch = 0
    reason: Literal["succeeded", "failed", "suspended", "superseded", "removed"]
    message: Text = ""


class Error(Wire):
    """The last message was refused, with the reason. Not fatal."""

    kind: Literal["error"] = "error"
    epoch: Epoch = 0
    message: Text


CoordinatorMessage = Annotated[
    Joined | HostStore | Formed | Dissolved | Command | Acked | Shutdown | Error, Field(discriminator="kind")
]
COORDINATOR_MESSAGE: TypeAdapter[CoordinatorMessage] = TypeAdapter(CoordinatorMessage)
