"""The coordinator against arbitrary orders of joins, losses, silence, reconnects, restarts and changes of mind.

The builders check at every announcement: one generation for each number, numbers rise, ranks 0..n-1, distinct slots
whose pods exist, never below the minimum, whole replicas of the model. Here: never two generations at a time, and when
faults stop the job trains.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pretrain_api.messages import reports
from pretrain_api.spec.replicas import round_down
from pretrain_operator.facts.fact import GenerationAnnounced, GenerationEnded
from pretrain_operator.liveness.timings import Timings
from support.coordinator import CoordinatorWorld

SLOTS = 5
QUICK = Timings(command_backoff=1.0, command_backoff_at_most=4.0, command_timeout=20.0, hold_seconds=5.0)
pick = st.integers(0, 99)


class Faults(RuleBasedStateMachine):
    """Faults of every kind, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = CoordinatorWorld(timings=QUICK)

    @initialize(
        replicas=st.integers(1, 4),
        least=st.integers(1, 3),
        replica_quantum=st.integers(1, 3),
        shrink_after=st.sampled_from([0.0, 2.0]),
        workers=st.integers(1, 4),
        reconnect_after=st.sampled_from([0.2, 0.8, 3.0, None]),
    )
    def begin(
        self,
        replicas: int,
        least: int,
        replica_quantum: int,
        shrink_after: float,
        workers: int,
        reconnect_after: float | None,
    ) -> None:
        self.world = CoordinatorWorld(
            timings=QUICK,
            replicas=replicas,
            min=min(least, replicas),
            replica_quantum=replica_quantum,
            shrink_after=shrink_after,
        )
        self.world.reconnect_after = reconnect_after
        for slot in range(workers):
            self.world.start(slot)
        self.world.run(2.0)

    def one(self, number: int, **having: bool):
        agents = [a for a in self.world.agents if a.alive and all(getattr(a, k) == v for k, v in having.items())]
        return agents[number % len(agents)] if agents else None

    @rule(slot=st.integers(0, SLOTS - 1), pod=st.booleans(), connect=st.booleans())
    def a_worker_starts(self, slot: int, pod: bool, connect: bool) -> None:
        attempts = [agent.attempt for agent in self.world.agents if agent.slot == slot]
        self.world.start(slot, max(attempts, default=-1) + 1, pod=pod, connect=connect)

    @rule(number=pick)
    def a_twin_of_a_worker_starts(self, number: int) -> None:
        if (agent := self.one(number)) is not None:
            self.world.start(agent.slot, agent.attempt, pod=False)

    @rule(number=pick, pod_gone=st.booleans())
    def a_worker_is_killed(self, number: int, pod_gone: bool) -> None:
        if (agent := self.one(number)) is not None:
            self.world.kill(agent, pod_gone=pod_gone)

    @rule(number=pick)
    def a_pod_is_lost_from_the_list(self, number: int) -> None:
        if (agent := self.one(number)) is not None:
            self.world.lose_pod(agent)

    @rule(number=pick)
    def a_connection_breaks(self, number: int) -> None:
        if (agent := self.one(number)) is not None:
            self.world.cut(agent)

    @rule(number=pick)
    def an_agent_connects_again(self, number: int) -> None:
        if (agent := self.one(number)) is not None:
            self.world.connect(agent)

    @rule(number=pick)
    def a_worker_stops_or_wakes_up(self, number: int) -> None:
        if (agent := self.one(number)) is not None:
            agent.stopped = not agent.stopped

    @rule(number=pick)
    def a_worker_gets_sigterm(self, number: int) -> None:
        if (agent := self.one(number)) is not None:
            self.world.terminate(agent)

    @rule(number=pick)
    def ranks_hang(self, number: int) -> None:
        if (agent := self.one(number)) is not None:
            agent.frozen_ranks = True

    @rule(number=pick, reason=st.sampled_from(["Killed", "CollectiveError"]), old=st.integers(0, 2))
    def a_rank_fails(self, number: int, reason: str, old: int) -> None:
        if (agent := self.one(number)) is not None and agent.runs:
            agent.failed = agent.failed or not old
            agent.say(reports.Failed(rank=0, reason=reason), self.world.now, generation=max(0, agent.runs - old))

    @rule(number=pick, ahead=st.integers(0, 3))
    def a_number_is_taken(self, number: int, ahead: int) -> None:
        if (agent := self.one(number)) is not None and agent.runs:
            agent.say(reports.NumberTaken(highest=agent.runs + ahead), self.world.now)

    @rule(number=pick)
    def a_report_comes_twice(self, number: int) -> None:
        agent = self.one(number)
        if agent is not None and agent.joined and agent.unacked:
            agent.outgoing.append(agent.unacked[0])

    @rule(number=pick)
    def a_store_does_not_start(self, number: int) -> None:
        if (agent := self.one(number)) is not None:
            agent.hosts_stores = not agent.hosts_stores

    @rule(replicas=st.integers(1, 4), least=st.integers(1, 3), removed=st.sets(st.integers(0, SLOTS - 1), max_size=2))
    def other_members_are_wanted(self, replicas: int, least: int, removed: set[int]) -> None:
        self.world.set_want(replicas=replicas, min=min(least, replicas), remove_slots=frozenset(removed))

    @rule(running=st.booleans())
    def the_job_is_suspended_or_resumed(self, running: bool) -> None:
        self.world.set_want(running=running)

    @rule(delivered=st.booleans())
    def the_job_is_suspended_and_its_agents_are_let_go(self, delivered: bool) -> None:
        self.world.set_want(running=False)
        self.world.end("suspended")
        if delivered:
            self.world.exchange()

    @precondition(lambda self: self.world.coordinator is not None)
    @rule()
    def the_coordinator_dies(self) -> None:
        self.world.crash()

    @precondition(lambda self: self.world.coordinator is None)
    @rule(epoch=st.integers(0, 1))
    def a_coordinator_starts(self, epoch: int) -> None:
        self.world.epoch += epoch
        self.world.boot()

    @precondition(lambda self: self.world.coordinator is not None)
    @rule(seconds=st.sampled_from([0.05, 1.0, 5.0]))
    def the_coordinator_is_replaced(self, seconds: float) -> None:
        self.world.crash()
        self.world.run(seconds)
        self.world.epoch += 1
        self.world.boot()

    @rule(number=pick)
    def part_of_what_is_under_way_arrives(self, number: int) -> None:
        if (agent := self.one(number)) is not None:
            self.world.deliver(agent)

    @rule(seconds=st.sampled_from([0.05, 0.2, 0.6, 1.5, 4.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.run(seconds)

    @invariant()
    def one_generation_is_current_at_most(self) -> None:
        coordinator = self.world.coordinator
        if coordinator is None:
            return
        view = coordinator.view()
        said = self.world.facts[self.world.facts_before_boot :]
        ended = [fact.number for fact in said if isinstance(fact, GenerationEnded)]
        assert len(ended) == len(set(ended)), "a generation ended twice"
        announced = [fact.generation.number for fact in self.world.facts if isinstance(fact, GenerationAnnounced)]
        assert announced == sorted(set(announced))
        if view.current is not None:
            assert view.current.number not in ended
            assert view.current.number <= view.highest_number
        for agent in self.world.agents:
            if agent.generation is not None:
                assert agent.generation == self.world.formed[agent.runs], "one number, two generations"

    def teardown(self) -> None:
        """When faults stop, every reachable state makes progress."""
        world = self.world
        world.exchange()  # Who was told to go goes.
        for agent in world.agents:
            agent.hosts_stores = True
            if agent.alive and (agent.stopped or agent.leaving or (agent.slot, agent.attempt) not in world.pods):
                agent.stopped = False
                world.kill(agent)
        living = {(agent.slot, agent.attempt) for agent in world.agents if agent.alive}
        world.pods &= living
        if world.coordinator is None:
            world.boot()
        world.set_want(running=True, remove_slots=frozenset(), min=1, hang_timeout=2.0)
        impatient = replace(QUICK, hang_apart_from_steps=2.0)
        world.coordinator._liveness._timings = impatient  # type: ignore[union-attr]
        for agent in world.agents:
            if agent.alive and agent.connection is None:
                world.connect(agent)
        quantum = world.want().replica_quantum
        world.set_want(replicas=max(world.want().replicas, quantum))
        for slot in range(quantum):  # As the plan would: enough workers for one replica.
            if slot not in {slot for slot, _ in living}:
                world.start(slot, 1 + max((agent.attempt for agent in world.agents), default=0))
        assert world.run_until(self.everybody_trains, 60), self.explain()

    def everybody_trains(self) -> bool:
        world = self.world
        alive = {agent.slot for agent in world.agents if agent.alive and (agent.slot, agent.attempt) in world.pods}
        want = world.want()
        if len(world.members()) != round_down(min(want.replicas, len(alive)), want.replica_quantum):
            return False
        steps, number = world.steps(), world.current.number if world.current else 0
        world.run(0.5)
        return world.steps() > steps and world.current is not None and world.current.number == number

    def explain(self) -> str:
        world = self.world
        return f"members {world.members()}, ended {world.causes()[-5:]}, view {world.coordinator.view()}"  # type: ignore[union-attr]


TestFaults = Faults.TestCase
TestFaults.settings = settings(
    max_examples=150,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[phase for phase in Phase if phase is not Phase.explain],  # It traces every line: minutes for one failure.
)
