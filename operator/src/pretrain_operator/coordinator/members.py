"""The agents of one job: admission, replacement and removal."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain_api.messages.protocol import Generation, Hello, Member
from pretrain_operator.coordinator.types import AgentView
from pretrain_operator.liveness.timings import Timings

ConnectionId = int
Pods = frozenset[tuple[int, int]]


@dataclass(eq=False)
class Agent:
    """State of one agent process. Mutable; owned by the Roster."""

    hello: Hello
    connection: ConnectionId | None
    since: float
    heard_at: float
    joined_at: float | None = None
    closed_at: float | None = None
    """Time of its disconnect; None: connected."""
    rankless_at: float | None = None
    """Time of a reconnect without the ranks it should run; None: no such reconnect."""
    final_at: float | None = None
    """Time of its final leaving message; it exits next."""
    leaving: bool = False
    dismissed: bool = False
    """It received a shutdown on its current connection; cleared by its next hello, which proves the message lost."""
    silent: bool = False
    """Lost by silence; cleared by its next message."""
    failed_hosts: int = 0
    """Stores it failed to host in time; such an agent becomes rank 0 only if no other agent can."""
    runs: int = 0
    """Generation that it was last sent, or that it claims to run; 0: none."""
    acked_seq: int = 0
    ack_due: float | None = None
    step: int = 0
    step_generation: int = 0

    @property
    def id(self) -> str:
        """Random id of the process."""
        return self.hello.agent_id

    @property
    def pod(self) -> tuple[int, int]:
        """(slot, attempt)."""
        return (self.hello.slot, self.hello.attempt)

    @property
    def joined(self) -> bool:
        """It is admitted to the job."""
        return self.joined_at is not None

    @property
    def connected(self) -> bool:
        """It has a connection, which does not prove that it lives."""
        return self.connection is not None

    @property
    def available(self) -> bool:
        """It can be a member of the next generation."""
        return self.joined and self.connected and not (self.leaving or self.dismissed or self.silent)

    @property
    def claim(self) -> Generation | None:
        """The generation that its last hello claims to run, if it is a member of it."""
        generation = self.hello.generation
        if generation is None or all(member.agent_id != self.id for member in generation.members):
            return None
        return generation

    @property
    def claimed_number(self) -> int:
        """Lineage number of the generation that it claims to run; 0: none."""
        return max(self.claim.number, self.hello.rolled_to) if self.claim is not None else 0

    def as_member(self, rank: int) -> Member:
        """Return it as a member of a generation."""
        hello = self.hello
        return Member(
            rank=rank,
            agent_id=hello.agent_id,
            slot=hello.slot,
            attempt=hello.attempt,
            host=hello.host,
            node=hello.node,
            processes=hello.processes,
        )

    def view(self, current: Generation | None) -> AgentView:
        """Return the immutable view of it."""
        members = current.members if current is not None else ()
        return AgentView(
            agent_id=self.id,
            slot=self.hello.slot,
            attempt=self.hello.attempt,
            node=self.hello.node,
            connected=self.connected,
            last_heard=self.heard_at,
            rank=next((member.rank for member in members if member.agent_id == self.id), None),
            step=self.step,
            leaving=self.leaving or self.dismissed,
        )


@dataclass(frozen=True)
class Admissions:
    """Changes of one admission pass."""

    joined: tuple[Agent, ...] = ()
    removed: tuple[tuple[Agent, str], ...] = ()
    """Agents removed from the roster, each with its reason."""


class Roster:
    """All agents of a job. At most one agent per slot is joined: the highest attempt whose pod exists."""

    def __init__(self, timings: Timings) -> None:
        self._timings = timings
        self._agents: dict[str, Agent] = {}
        self._by_connection: dict[ConnectionId, Agent] = {}

    @property
    def agents(self) -> tuple[Agent, ...]:
        """All agents, joined or waiting."""
        return tuple(self._agents.values())

    @property
    def joined(self) -> tuple[Agent, ...]:
        """Joined agents, connected or not."""
        return tuple(agent for agent in self._agents.values() if agent.joined)

    def find(self, agent_id: str) -> Agent | None:
        """Return the agent with this id, or None."""
        return self._agents.get(agent_id)

    def on(self, connection: ConnectionId) -> Agent | None:
        """Return the agent on this connection, or None."""
        return self._by_connection.get(connection)

    def of_pod(self, pod: tuple[int, int]) -> Agent | None:
        """Return the agent of this pod, the joined one first, or None."""
        agents = sorted(self._agents.values(), key=lambda agent: not agent.joined)
        return next((agent for agent in agents if agent.pod == pod), None)

    def register(self, connection: ConnectionId, hello: Hello, now: float) -> ConnectionId | None:
        """Register a hello; returns the agent's previous connection, which this one replaces, or None."""
        agent = self._agents.get(hello.agent_id)
        if agent is None:
            agent = Agent(hello=hello, connection=connection, since=now, heard_at=now)
            self._agents[hello.agent_id] = agent
            replaced = None
        else:
            replaced = agent.connection if agent.connection != connection else None
            agent.hello = hello
            agent.connection = connection
        if replaced is not None:
            self._by_connection.pop(replaced, None)
        self._by_connection[connection] = agent
        agent.heard_at, agent.closed_at, agent.rankless_at, agent.silent = now, None, None, False
        agent.leaving, agent.dismissed = agent.leaving or hello.leaving, False
        agent.runs = hello.generation.number if hello.generation is not None else 0
        return replaced

    def disconnect(self, connection: ConnectionId, now: float) -> Agent | None:
        """Record a disconnect. An agent that has not joined is removed with its connection."""
        agent = self._by_connection.pop(connection, None)
        if agent is None:
            return None
        agent.connection, agent.closed_at = None, now
        if not agent.joined:
            self.remove(agent)
        return agent

    def remove(self, agent: Agent) -> None:
        """Remove an agent."""
        self._agents.pop(agent.id, None)
        if agent.connection is not None:
            self._by_connection.pop(agent.connection, None)

    def admit(self, pods: Pods, now: float) -> Admissions:
        """Admit the agents that may join and remove those that may not stay: joined agents first, then by attempt."""
        joined: list[Agent] = []
        removed: list[tuple[Agent, str]] = []
        for agent in sorted(self._agents.values(), key=lambda agent: (not agent.joined, agent.pod)):
            reason = self._removal_reason(agent, pods, now)
            if reason is not None:
                self.remove(agent)
                removed.append((agent, reason))
            elif not agent.joined and agent.pod in pods and not self._waits_for_predecessor(agent):
                for rival in self._rivals(agent):
                    self.remove(rival)
                    removed.append((rival, f"attempt {agent.hello.attempt} of slot {agent.hello.slot} replaced it"))
                agent.joined_at = now
                joined.append(agent)
        joined = [agent for agent in joined if agent.id in self._agents]
        return Admissions(tuple(joined), tuple(removed))

    def _rivals(self, agent: Agent) -> tuple[Agent, ...]:
        return tuple(
            other
            for other in self._agents.values()
            if other is not agent and other.joined and other.pod[0] == agent.pod[0]
        )

    def _removal_reason(self, agent: Agent, pods: Pods, now: float) -> str | None:
        slot, attempt = agent.pod
        newest = max((rival.pod[1] for rival in self._rivals(agent)), default=-1)
        if attempt < newest:
            return f"attempt {newest} of slot {slot} replaced it"
        if agent.pod in pods:
            return None
        newest = max([newest, *(other for pod_slot, other in pods if pod_slot == slot)])
        lagging = attempt > newest and now - agent.since < self._timings.pod_lag
        if not agent.joined and lagging:
            return None
        return f"no pod of attempt {attempt} of slot {slot} exists"

    def _waits_for_predecessor(self, agent: Agent) -> bool:
        for rival in self._rivals(agent):
            if rival.pod == agent.pod and rival.connected and not rival.silent:
                return True
            if rival.leaving and rival.connected and rival.final_at is None:
                # It takes its last checkpoint: replacing it now would lose the steps since the previous one.
                return True
        return False
