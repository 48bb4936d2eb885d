"""The wire protocol between agents and the coordinator: JSON texts over one WebSocket per agent.

Every message is a member of a discriminated union on `kind`. Unknown fields are ignored, an unknown kind is answered
with `Error` by the coordinator and dropped by the agent. Messages of the coordinator carry the epoch of the operator
that sent them; agents refuse a lower one than the highest they have seen.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from pretrain_api.base import Wire
from pretrain_api.messages.reports import ReportBody

PROTOCOL_VERSION = 1


class Member(Wire):
    """One agent's place in a generation. `rank` is the agent's (torchrun's group rank), not a process's."""

    rank: int = Field(ge=0)
    agent_id: str
    slot: int = Field(ge=0)
    attempt: int = Field(ge=0)
    host: str
    node: str = ""
    processes: int = Field(default=1, ge=1)


class Generation(Wire):
    """A fixed set of workers that train together. Members are ordered by rank: 0..n-1."""

    number: int = Field(ge=1)
    job_uid: str
    members: tuple[Member, ...]
    store_host: str
    store_port: int
    reason: str = Field(description="Why it was formed: `Started`, `WorkerLost`, `WorkerJoined`, `Resized`, …")
    rejected: tuple[str, ...] = Field(
        default=(), description="Keys of manifests that ranks found corrupt: not to be restored from"
    )
    may_take_over: bool = Field(
        default=False, description="The job's first generation: a prefix of the same identity may be taken over"
    )

    @property
    def world_size(self) -> int:
        """The number of training processes."""
        return sum(member.processes for member in self.members)


# --- agent to coordinator ---------------------------------------------------------------------------------------------


class Hello(Wire):
    """The first message on every connection: who is here, and all that a coordinator with no memory must know."""

    kind: Literal["hello"] = "hello"
    version: int = PROTOCOL_VERSION
    job_uid: str
    slot: int = Field(ge=0)
    attempt: int = Field(ge=0)
    agent_id: str = Field(description="Random, one for each agent process")
    host: str = Field(description="Address at which the other workers reach this one")
    node: str = ""
    pid: int = 0
    processes: int = Field(default=1, ge=1, description="Training processes that this agent starts")
    generation: Generation | None = Field(default=None, description="The whole generation whose ranks run here now")
    highest_number: int = Field(default=0, description="The highest generation number this agent ever saw")
    rolled_to: int = Field(
        default=0, description="The number that the ranks of `generation` took by a rollback; 0: none"
    )
    highest_epoch: int = 0
    step: int = Field(default=0, description="Steps completed, as far as this agent's ranks said")
    stepped_seconds: float | None = Field(
        default=None, description="Since its ranks said that they got a step further; None: not yet in this generation"
    )
    step_seconds: float = Field(
        default=0.0, description="What the last step took, as it looked from here; 0: not known"
    )
    leaving: bool = Field(default=False, description="SIGTERM was received: it will go at the next step boundary")


class StoreReady(Wire):
    """The TCPStore asked for by HostStore listens."""

    kind: Literal["store_ready"] = "store_ready"
    number: int
    port: int


class Report(Wire):
    """What a rank said. `seq` counts from 1 for each agent id, without gaps; replayed until acknowledged."""

    kind: Literal["report"] = "report"
    seq: int = Field(ge=1)
    generation: int = Field(description="The generation whose rank said it")
    time: float = Field(description="Unix seconds at the agent when it was received from the rank")
    body: ReportBody


class Heartbeat(Wire):
    """Sent every HEARTBEAT_SECONDS when nothing else was; carries the newest step so that progress is seen."""

    kind: Literal["heartbeat"] = "heartbeat"
    generation: int = 0
    step: int = 0


class Leaving(Wire):
    """SIGTERM was received. `final`: the ranks hold or are gone and the process exits next; before: a checkpoint is
    being taken at the next step boundary."""

    kind: Literal["leaving"] = "leaving"
    final: bool = False
    reason: str = "SIGTERM"


AgentMessage = Annotated[Hello | StoreReady | Report | Heartbeat | Leaving, Field(discriminator="kind")]
AGENT_MESSAGE: TypeAdapter[AgentMessage] = TypeAdapter(AgentMessage)

HEARTBEAT_SECONDS = 0.25


# --- coordinator to agent ---------------------------------------------------------------------------------------------


class Joined(Wire):
    """The answer to Hello: the agent belongs to this job. Reports up to `acked_seq` are known."""

    kind: Literal["joined"] = "joined"
    epoch: int = 0
    acked_seq: int = 0


class HostStore(Wire):
    """Asks the agent that will be rank 0 to listen with a TCPStore of its own for this generation only."""

    kind: Literal["host_store"] = "host_store"
    epoch: int = 0
    number: int


class Formed(Wire):
    """The generation to join now; ranks of any other one are killed at once."""

    kind: Literal["generation"] = "generation"
    epoch: int = 0
    generation: Generation


class Dissolved(Wire):
    """The generation ended and no next one can be formed yet: ranks are killed at once, the agent stays and waits."""

    kind: Literal["dissolved"] = "dissolved"
    epoch: int = 0
    number: int
    reason: str


class Command(Wire):
    """For the ranks, passed on as it is, to be carried out from the next step boundary on, on which all ranks agree.

    `checkpoint`: save, then hold for `hold_seconds` (0: go on at once) or until the generation ends. `profile`: rank
    `rank` records the next `steps` steps and puts the trace into the store; nobody waits for it.
    """

    kind: Literal["command"] = "command"
    epoch: int = 0
    id: str
    generation: int
    action: Literal["checkpoint", "profile"] = "checkpoint"
    hold_seconds: float = Field(default=0.0, ge=0)
    steps: int = Field(default=0, ge=0)
    rank: int = Field(default=0, ge=0)


class Acked(Wire):
    """Reports up to and including `seq` were taken in; the agent may forget them."""

    kind: Literal["acked"] = "acked"
    epoch: int = 0
    seq: int


class Shutdown(Wire):
    """Kill the ranks and exit. `superseded`: another attempt of this slot took over (or the pod is unknown)."""

    kind: Literal["shutdown"] = "shutdown"
    epoch: int = 0
    reason: Literal["succeeded", "failed", "suspended", "superseded", "removed"]
    message: str = ""


class Error(Wire):
    """The last message could not be used: why. Never fatal by itself."""

    kind: Literal["error"] = "error"
    epoch: int = 0
    message: str


CoordinatorMessage = Annotated[
    Joined | HostStore | Formed | Dissolved | Command | Acked | Shutdown | Error, Field(discriminator="kind")
]
COORDINATOR_MESSAGE: TypeAdapter[CoordinatorMessage] = TypeAdapter(CoordinatorMessage)
