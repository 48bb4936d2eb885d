"""A simulated world around a Coordinator: agents with training ranks, breaking connections, changing pods.

Ranks follow the same laws as real ones: a step needs every member of the generation, a dead member makes the
others report a collective error, a command holds all of them at the same step.
The simulation contains no rule of the coordinator.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field, replace

from pretrain_api.messages import protocol, reports
from pretrain_api.messages.protocol import (
    CoordinatorMessage,
    Formed,
    Generation,
    Heartbeat,
    Hello,
    Leaving,
    Report,
    StoreReady,
)
from pretrain_operator.coordinator.machine import Coordinator, ShutdownReason
from pretrain_operator.coordinator.output import CoordinatorOutput
from pretrain_operator.coordinator.types import Want
from pretrain_operator.facts.fact import CoordinatorFact, GenerationAnnounced, GenerationEnded, Reported
from pretrain_operator.liveness.timings import Timings

JOB = "job-1"
START = 1_000.0
SLICE = 0.05


def a_want(pods: frozenset[tuple[int, int]] = frozenset(), **changes: object) -> Want:
    return replace(Want(replicas=3, min=1, max=5, formation_wait=1.0, pods=pods), **changes)  # type: ignore[arg-type]


@dataclass(eq=False)
class SimAgent:
    """One agent process with its ranks."""

    slot: int
    attempt: int
    id: str
    alive: bool = True
    stopped: bool = False
    hosts_stores: bool = True
    connection: int | None = None
    joined: bool = False
    outgoing: deque[protocol.AgentMessage] = field(default_factory=deque)
    incoming: deque[CoordinatorMessage] = field(default_factory=deque)
    received: list[CoordinatorMessage] = field(default_factory=list)
    generation: Generation | None = None
    highest: int = 0
    rolled_to: int = 0
    formed_number: int = 0
    epoch: int = 0
    step: int = 0
    stepped_at: float | None = None
    reports_steps: bool = True
    """Its hellos date the last step."""
    started: bool = False
    failed: bool = False
    frozen_ranks: bool = False
    command: protocol.Command | None = None
    held: protocol.Command | None = None
    held_at: float = 0.0
    leaving: bool = False
    processes: int = 1
    unacked: list[Report] = field(default_factory=list)
    seq: int = 0
    beat_at: float = 0.0
    cut_at: float = 0.0

    @property
    def runs(self) -> int:
        return self.generation.number if self.generation else 0

    @property
    def awake(self) -> bool:
        return self.alive and not self.stopped

    def hello(self, now: float, **changes: object) -> Hello:
        stepped_at = self.stepped_at if self.reports_steps else None
        hello = Hello(
            job_uid=JOB,
            slot=self.slot,
            attempt=self.attempt,
            agent_id=self.id,
            host=f"host-{self.slot}",
            node=f"node-{self.slot}",
            processes=self.processes,
            generation=self.generation,
            highest_number=self.highest,
            rolled_to=self.rolled_to,
            highest_epoch=self.epoch,
            step=self.step,
            stepped_seconds=None if stepped_at is None else now - stepped_at,
            step_seconds=0.0 if stepped_at is None else SLICE,
            leaving=self.leaving,
        )
        return hello.model_copy(update=changes)

    def say(self, body: reports.ReportBody, now: float, generation: int | None = None) -> Report:
        self.seq += 1
        number = self.runs if generation is None else generation
        report = Report(seq=self.seq, generation=number, time=now, body=body)
        self.unacked.append(report)
        if self.connection is not None and self.joined:
            self.outgoing.append(report)
        return report

    def obey(self, message: CoordinatorMessage) -> None:
        if message.epoch < self.epoch:
            return
        self.epoch = message.epoch
        self.received.append(message)
        match message:
            case protocol.Joined():
                self.joined = True
                self.unacked = [report for report in self.unacked if report.seq > message.acked_seq]
                self.outgoing.extend(self.unacked)
            case protocol.HostStore():
                self.highest = max(self.highest, message.number)
                if self.hosts_stores:
                    self.outgoing.append(StoreReady(number=message.number, port=20_000 + message.number))
            case Formed():
                if message.generation.number > self.formed_number:
                    self.formed_number = message.generation.number
                    self._run(message.generation)
            case protocol.Dissolved():
                self._run(None)
            case protocol.Command():
                if message.generation == self.runs:
                    self.command = message
            case protocol.Acked():
                self.unacked = [report for report in self.unacked if report.seq > message.seq]
            case protocol.Shutdown():
                self.alive = False
            case protocol.Error():
                pass

    def _run(self, generation: Generation | None) -> None:
        self.generation = generation
        if generation is not None:
            self.highest = max(self.highest, generation.number)
        self.started = self.failed = self.frozen_ranks = False
        self.rolled_to = 0
        self.command = self.held = None

    def of(self, kind: type) -> list:
        return [message for message in self.received if isinstance(message, kind)]


class CoordinatorWorld:
    """Agents, pods and one coordinator at a time, with a manual clock."""

    def __init__(self, *, timings: Timings | None = None, epoch: int = 1, highest: int = 0, **want: object) -> None:
        self.timings = timings or Timings()
        self.now = START
        self.epoch = epoch
        self.known_number = highest
        self.want_changes: dict[str, object] = want
        self.pods: set[tuple[int, int]] = set()
        self.agents: list[SimAgent] = []
        self.facts: list[CoordinatorFact] = []
        self.facts_before_boot = 0
        self.formed: dict[int, Generation] = {}
        self.closed_by_coordinator: list[int] = []
        self.saved_step = 0
        self.reconnect_after: float | None = None
        """Seconds after which agents reconnect by themselves; None: only on `connect`."""
        self._ids = itertools.count(1)
        self._connections: dict[int, SimAgent] = {}
        self.coordinator: Coordinator | None = None
        self.boot()

    # --- the coordinator ---

    def boot(self) -> None:
        self.facts_before_boot = len(self.facts)
        self.coordinator = Coordinator(JOB, self.epoch, self.known_number, self.timings)
        self.set_want()

    def crash(self) -> None:
        self.coordinator = None
        for agent in self.agents:
            self.cut(agent)

    def want(self) -> Want:
        return a_want(frozenset(self.pods), **self.want_changes)

    def set_want(self, **changes: object) -> None:
        self.want_changes |= changes
        if self.coordinator is not None:
            self.carry_out(self.coordinator.set_want(self.want(), self.now))

    def end(self, reason: ShutdownReason) -> None:
        if self.coordinator is not None:
            self.carry_out(self.coordinator.end(reason, "", self.now))

    def carry_out(self, output: CoordinatorOutput) -> None:
        for fact in output.facts:
            self.facts.append(fact)
            if isinstance(fact, GenerationAnnounced):
                self.check_announced(fact.generation)
        for connection, message in output.sends:
            if isinstance(message, Formed):
                known = self.formed.setdefault(message.generation.number, message.generation)
                assert known == message.generation, "one number was given to two generations"
                assert message.generation.number == max(self.formed), "an old generation was sent out"
            if (agent := self._connections.get(connection)) is not None:
                agent.incoming.append(message)
        for connection in output.closes:
            self.closed_by_coordinator.append(connection)
            if (agent := self._connections.get(connection)) is not None:
                while agent.connection == connection and agent.incoming and agent.alive:
                    agent.obey(agent.incoming.popleft())
                self.cut(agent)
        if self.coordinator is not None:
            self.known_number = self.coordinator.view().highest_number

    def check_announced(self, generation: Generation) -> None:
        want = self.want()
        members = generation.members
        assert [member.rank for member in members] == list(range(len(members)))
        assert len({member.slot for member in members}) == len(members)
        assert {(member.slot, member.attempt) for member in members} <= want.pods
        assert max(want.min, 1) <= len(members) <= want.replicas
        assert len(members) % want.replica_quantum == 0, "whole replicas of the model"
        assert not want.remove_slots & {member.slot for member in members}
        assert generation.number > max(self.formed, default=0), "numbers rise"
        assert generation.world_size == sum(member.processes for member in members)

    # --- agents and pods ---

    def start(
        self, slot: int, attempt: int = 0, *, pod: bool = True, connect: bool = True, **changes: object
    ) -> SimAgent:
        agent = SimAgent(slot=slot, attempt=attempt, id=f"agent-{slot}-{attempt}-{next(self._ids)}")
        for name, value in changes.items():
            setattr(agent, name, value)
        self.agents.append(agent)
        if pod:
            self.pods.add((slot, attempt))
            self.set_want()
        if connect:
            self.connect(agent)
        return agent

    def connect(self, agent: SimAgent, **changes: object) -> None:
        if self.coordinator is None or not agent.awake:
            return
        connection = next(self._ids)
        if agent.connection is not None:
            self._connections.pop(agent.connection, None)  # Half-open: the coordinator has not noticed.
        agent.connection, agent.joined = connection, False
        agent.outgoing.clear()
        agent.incoming.clear()
        self._connections[connection] = agent
        agent.beat_at = self.now
        self.carry_out(self.coordinator.connected(connection, agent.hello(self.now, **changes), self.now))

    def cut(self, agent: SimAgent) -> None:
        """Break the connection; messages in flight are lost."""
        connection, agent.connection, agent.joined, agent.cut_at = agent.connection, None, False, self.now
        agent.outgoing.clear()
        agent.incoming.clear()
        if connection is not None:
            self._connections.pop(connection, None)
            if self.coordinator is not None:
                self.carry_out(self.coordinator.disconnected(connection, self.now))

    def kill(self, agent: SimAgent, *, pod_gone: bool = False) -> None:
        """Kill the agent with its ranks; the pod's end may be observed later."""
        agent.alive = False
        self.cut(agent)
        if pod_gone:
            self.lose_pod(agent)

    def lose_pod(self, agent: SimAgent) -> None:
        self.pods.discard((agent.slot, agent.attempt))
        self.set_want()

    def terminate(self, agent: SimAgent) -> None:
        """Send SIGTERM: the agent commands a checkpoint and reports that it leaves."""
        agent.leaving = True
        if agent.connection is not None:
            agent.outgoing.append(Leaving())
        if agent.generation is not None:
            agent.command = protocol.Command(id=f"leave-{agent.id}", generation=agent.runs, hold_seconds=30)

    # --- time ---

    def run(self, seconds: float) -> None:
        """Advance the world by a number of seconds."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.slice()

    def run_until(self, condition: object, seconds: float = 30.0) -> bool:
        end = self.now + seconds
        while self.now < end:
            if condition():  # type: ignore[operator]
                return True
            self.slice()
        return bool(condition())  # type: ignore[operator]

    def slice(self) -> None:
        self.now += SLICE
        for agent in self.agents:
            if agent.awake and agent.connection is not None and self.now - agent.beat_at >= protocol.HEARTBEAT_SECONDS:
                agent.beat_at = self.now
                agent.outgoing.append(Heartbeat(generation=agent.runs, step=agent.step))
        if self.reconnect_after is not None:
            for agent in self.agents:
                if agent.connection is None and self.now - agent.cut_at >= self.reconnect_after:
                    self.connect(agent)
        self.train()
        self.exchange()
        if self.coordinator is not None:
            deadline = self.coordinator.next_deadline()
            if deadline is not None and deadline <= self.now:
                self.carry_out(self.coordinator.tick(self.now))
        self.exchange()

    def exchange(self) -> None:
        """Deliver messages until none is in flight."""
        while sum(self.deliver(agent) for agent in self.agents):
            pass

    def deliver(self, agent: SimAgent) -> bool:
        moved = False
        while agent.awake and agent.incoming:
            agent.obey(agent.incoming.popleft())
            moved = True
        if not agent.alive and agent.connection is not None:
            self.cut(agent)
        while self.coordinator is not None and agent.connection is not None and agent.outgoing:
            message = agent.outgoing.popleft()
            self.carry_out(self.coordinator.received(agent.connection, message, self.now))
            moved = True
        return moved

    def train(self) -> None:
        """Advance all ranks: a generation completes a step when every member takes part."""
        generations = {agent.runs: agent.generation for agent in self.agents if agent.alive and agent.generation}
        for generation in generations.values():
            ranks = [self.agent(member.agent_id) for member in generation.members]
            present = [
                agent for agent in ranks if agent is not None and agent.alive and agent.runs == generation.number
            ]
            if any(agent.stopped or agent.frozen_ranks for agent in present):
                continue
            if len(present) < len(ranks) or any(agent.failed for agent in present):
                gone = [
                    agent for agent in ranks if agent is None or not agent.alive or agent.highest >= generation.number
                ]
                self.break_collectives(present if gone else [])
                continue
            self.train_together(present)

    def break_collectives(self, present: list[SimAgent]) -> None:
        for agent in present:
            if agent.started and not agent.failed:
                agent.failed = True
                agent.say(reports.Failed(rank=0, reason="CollectiveError"), self.now)

    def train_together(self, ranks: list[SimAgent]) -> None:
        first = ranks[0]
        if not all(agent.started for agent in ranks):
            for rank, agent in enumerate(ranks):
                agent.started, agent.step, agent.stepped_at = True, self.saved_step, None
                agent.say(reports.Started(rank=rank, local_rank=0, pid=100 + rank), self.now)
            first.say(reports.Restored(step=self.saved_step), self.now)
            return
        if first.held is not None:
            if self.now - first.held_at < first.held.hold_seconds:
                return
            for agent in ranks:
                agent.say(reports.Resumed(command_id=first.held.id, step=agent.step), self.now)
            for agent in ranks:
                agent.held = None
            return
        for agent in ranks:
            agent.step += 1
            agent.stepped_at = self.now
        first.say(a_step(first.step), self.now)
        command = next((agent.command for agent in ranks if agent.command is not None), None)
        if command is not None:
            self.saved_step = first.step
            for agent in ranks:
                agent.command, agent.held, agent.held_at = None, command, self.now
                agent.say(reports.Held(command_id=command.id, step=agent.step, checkpoint=f"c{agent.step}"), self.now)

    # --- what is seen ---

    def agent(self, agent_id: str) -> SimAgent | None:
        return next((agent for agent in self.agents if agent.id == agent_id), None)

    @property
    def current(self) -> Generation | None:
        return self.coordinator.view().current if self.coordinator else None

    def members(self) -> list[int]:
        """Slots of the current generation by rank."""
        return [member.slot for member in self.current.members] if self.current else []

    def ended(self) -> list[GenerationEnded]:
        return [fact for fact in self.facts if isinstance(fact, GenerationEnded)]

    def causes(self) -> list[str]:
        return [fact.cause for fact in self.ended()]

    def reported(self, kind: type) -> list[Reported]:
        return [fact for fact in self.facts if isinstance(fact, Reported) and isinstance(fact.body, kind)]

    def steps(self) -> int:
        return len(self.reported(reports.StepDone))


def a_step(step: int, seconds: float = SLICE) -> reports.StepDone:
    return reports.StepDone(
        step=step,
        loss=4.0,
        grad_norm=1.0,
        learning_rate=1e-3,
        tokens=step * 100,
        tokens_per_second=1.0,
        seconds=seconds,
    )


def a_running_world(workers: int = 3, **want: object) -> tuple[CoordinatorWorld, list[SimAgent]]:
    """Return a world in which a generation of this size trains, and its agents."""
    world = CoordinatorWorld(replicas=want.pop("replicas", workers), **want)  # type: ignore[arg-type]
    agents = [world.start(slot, connect=False) for slot in range(workers)]
    for agent in agents:
        world.connect(agent)
    assert world.run_until(lambda: world.steps() >= 3, 10), "it does not train"
    return world, agents
