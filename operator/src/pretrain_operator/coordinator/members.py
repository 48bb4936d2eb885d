"""Who is here: the agents of one job, which of them may join, and which must go."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain_api.messages.protocol import Generation, Hello, Member
from pretrain_operator.coordinator.settings import Settings
from pretrain_operator.coordinator.types import AgentView

ConnectionId = int
Pods = frozenset[tuple[int, int]]


@dataclass(eq=False)
class Agent:
    """What is known of one agent process. Mutable; lives in the Roster only."""

    hello: Hello
    connection: ConnectionId | None
    since: float
    heard_at: float
    joined_at: float | None = None
    closed_at: float | None = None
    """Since when it has no connection."""
    rankless_at: float | None = None
    """Since when it is known to run no ranks although it was told to: it came back without them."""
    final_at: float | None = None
    """When it said that it exits next."""
    leaving: bool = False
    dismissed: bool = False
    """It was told to exit on its present connection; cleared by its next hello, which shows that it did not hear."""
    silent: bool = False
    """Convicted of silence; cleared by its next word."""
    failed_hosts: int = 0
    """How often it did not host a store in time: such an agent is not made rank 0 while there are others."""
    runs: int = 0
    """The generation that it was last told to run, or said that it runs; 0: none."""
    acked_seq: int = 0
    ack_due: float | None = None
    step: int = 0
    step_generation: int = 0

    @property
    def id(self) -> str:
        """The random id of the process."""
        return self.hello.agent_id

    @property
    def pod(self) -> tuple[int, int]:
        """(slot, attempt)."""
        return (self.hello.slot, self.hello.attempt)

    @property
    def joined(self) -> bool:
        """It belongs to the job."""
        return self.joined_at is not None

    @property
    def connected(self) -> bool:
        """It has a connection, which says little of whether it lives."""
        return self.connection is not None

    @property
    def available(self) -> bool:
        """It may become a member of the next generation."""
        return self.joined and self.connected and not (self.leaving or self.dismissed or self.silent)

    @property
    def claim(self) -> Generation | None:
        """The generation that its last hello said it runs, if it is a member of it."""
        generation = self.hello.generation
        if generation is None or all(member.agent_id != self.id for member in generation.members):
            return None
        return generation

    @property
    def claimed_number(self) -> int:
        """The number in the lineage of the generation that it claims to run; 0: none."""
        return max(self.claim.number, self.hello.rolled_to) if self.claim is not None else 0

    def as_member(self, rank: int) -> Member:
        """Its place in a generation."""
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
        """What others see of it."""
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
    """What changed in who belongs to the job."""

    joined: tuple[Agent, ...] = ()
    refused: tuple[tuple[Agent, str], ...] = ()
    """Agents that are no longer in the roster, and why."""


class Roster:
    """All agents of a job. Of one slot at most one is joined: the highest attempt whose pod exists."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._agents: dict[str, Agent] = {}
        self._by_connection: dict[ConnectionId, Agent] = {}

    @property
    def agents(self) -> tuple[Agent, ...]:
        """Everybody, joined or waiting."""
        return tuple(self._agents.values())

    @property
    def joined(self) -> tuple[Agent, ...]:
        """Those that belong to the job, connected or not."""
        return tuple(agent for agent in self._agents.values() if agent.joined)

    def find(self, agent_id: str) -> Agent | None:
        """The agent of this id."""
        return self._agents.get(agent_id)

    def on(self, connection: ConnectionId) -> Agent | None:
        """The agent that speaks on this connection now."""
        return self._by_connection.get(connection)

    def greet(self, connection: ConnectionId, hello: Hello, now: float) -> ConnectionId | None:
        """Take in a hello. Returns the connection that it replaces: one agent speaks on one at a time."""
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

    def hang_up(self, connection: ConnectionId, now: float) -> Agent | None:
        """The connection is gone. An agent that has not joined is forgotten with it."""
        agent = self._by_connection.pop(connection, None)
        if agent is None:
            return None
        agent.connection, agent.closed_at = None, now
        if not agent.joined:
            self.forget(agent)
        return agent

    def forget(self, agent: Agent) -> None:
        """Drop an agent."""
        self._agents.pop(agent.id, None)
        if agent.connection is not None:
            self._by_connection.pop(agent.connection, None)

    def admit(self, pods: Pods, now: float) -> Admissions:
        """Let in who may join, drop who may not stay. Joined agents come first, then lower attempts."""
        joined: list[Agent] = []
        refused: list[tuple[Agent, str]] = []
        for agent in sorted(self._agents.values(), key=lambda agent: (not agent.joined, agent.pod)):
            refusal = self._refusal(agent, pods, now)
            if refusal is not None:
                self.forget(agent)
                refused.append((agent, refusal))
            elif not agent.joined and agent.pod in pods and not self._waits_for_rival(agent):
                for rival in self._rivals(agent):
                    self.forget(rival)
                    refused.append((rival, f"attempt {agent.hello.attempt} of slot {agent.hello.slot} took over"))
                agent.joined_at = now
                joined.append(agent)
        joined = [agent for agent in joined if agent.id in self._agents]
        return Admissions(tuple(joined), tuple(refused))

    def _rivals(self, agent: Agent) -> tuple[Agent, ...]:
        return tuple(
            other
            for other in self._agents.values()
            if other is not agent and other.joined and other.pod[0] == agent.pod[0]
        )

    def _refusal(self, agent: Agent, pods: Pods, now: float) -> str | None:
        slot, attempt = agent.pod
        newest = max((rival.pod[1] for rival in self._rivals(agent)), default=-1)
        if attempt < newest:
            return f"attempt {newest} of slot {slot} took over"
        if agent.pod in pods:
            return None
        newest = max([newest, *(other for pod_slot, other in pods if pod_slot == slot)])
        lagging = attempt > newest and now - agent.since < self._settings.pod_lag
        if not agent.joined and lagging:
            return None
        return f"no pod of attempt {attempt} of slot {slot} exists"

    def _waits_for_rival(self, agent: Agent) -> bool:
        for rival in self._rivals(agent):
            if rival.pod == agent.pod and rival.connected and not rival.silent:
                return True
            if rival.leaving and rival.connected and rival.final_at is None:
                # It takes its last checkpoint: taking over now would lose the steps since the one before.
                return True
        return False
