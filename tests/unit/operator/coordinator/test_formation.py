"""Formation of generations and admission of agents, one sentence each."""

from __future__ import annotations

from pretrain_api.messages import protocol
from pretrain_operator.coordinator.machine import Coordinator
from pretrain_operator.liveness.timings import Timings
from support.coordinator import CoordinatorWorld, a_running_world

# --- forming ---


def test_three_workers_form_the_first_generation_as_soon_as_the_third_is_there() -> None:
    world = CoordinatorWorld(replicas=3)
    agents = [world.start(slot, connect=False) for slot in range(3)]
    world.connect(agents[0])
    world.connect(agents[1])
    world.run(0.5)
    assert world.current is None

    world.connect(agents[2])
    world.exchange()

    assert world.current is not None
    assert (world.current.number, world.current.reason) == (1, "Started")
    assert world.members() == [0, 1, 2]
    assert world.current.may_take_over
    assert (world.current.store_host, world.current.store_port) == ("host-0", 20_001)
    assert all(agent.runs == 1 for agent in agents)


def test_nothing_is_formed_before_the_plan_said_what_it_wants() -> None:
    world = CoordinatorWorld(replicas=1)
    world.coordinator = Coordinator("job-1", 1, 0, Timings())
    agent = world.start(0, pod=False)

    world.run(5)

    assert agent.received == []
    assert world.coordinator.next_deadline() is None


def test_the_first_generation_is_formed_with_fewer_after_the_stated_wait() -> None:
    world = CoordinatorWorld(replicas=3, min=2, formation_wait=20.0)
    world.start(0)
    world.start(1)
    world.run(19)
    assert world.current is None

    world.run(2)

    assert world.members() == [0, 1]


def test_no_generation_is_formed_below_the_minimum() -> None:
    world = CoordinatorWorld(replicas=3, min=2)
    world.start(0)

    world.run(60)

    assert world.current is None
    assert world.coordinator is not None
    assert world.coordinator.view().forming


def test_a_generation_holds_whole_replicas_and_the_surplus_waits() -> None:
    world = CoordinatorWorld(replicas=4, replica_quantum=2)
    for slot in range(3):
        world.start(slot)

    world.run(2)
    assert world.members() == [0, 1]

    world.start(3)
    world.run(2)
    assert world.members() == [0, 1, 2, 3]


def test_fewer_workers_than_a_replica_takes_form_nothing() -> None:
    world = CoordinatorWorld(replicas=4, min=1, replica_quantum=4)
    for slot in range(3):
        world.start(slot)

    world.run(60)
    assert world.current is None

    world.start(3)
    world.run(2)
    assert world.members() == [0, 1, 2, 3]


def test_the_world_size_is_the_sum_of_the_workers_processes() -> None:
    world = CoordinatorWorld(replicas=2)
    world.start(0, processes=2)
    world.start(1, processes=3)

    world.run(2)

    assert world.current is not None
    assert world.current.world_size == 5


def test_a_host_that_drops_out_while_forming_makes_it_start_over_with_a_higher_number() -> None:
    world = CoordinatorWorld(replicas=3, formation_wait=0.0)
    first = world.start(0, hosts_stores=False)
    world.start(1)
    world.start(2)
    world.run(0.3)
    assert world.current is None

    world.kill(first, pod_gone=True)
    world.run(0.1)

    assert world.members() == [1, 2]
    assert world.current is not None
    assert world.current.number == 2


def test_a_host_that_does_not_answer_is_not_rank_0_the_next_time() -> None:
    world = CoordinatorWorld(replicas=3)
    for slot in range(3):
        world.start(slot, hosts_stores=slot != 0)

    world.run(6)

    assert world.members() == [1, 2, 0]
    assert world.current is not None
    assert world.current.number == 2


def test_a_host_that_reconnects_while_forming_is_asked_again() -> None:
    world = CoordinatorWorld(replicas=1)
    agent = world.start(0)
    world.connect(agent)  # What it was asked is lost with the connection before.
    world.run(0.1)

    assert world.current is not None
    assert world.current.number == 1


def test_a_change_of_mind_while_forming_makes_it_start_over() -> None:
    world = CoordinatorWorld(replicas=3)
    agents = [world.start(slot, hosts_stores=False) for slot in range(3)]
    world.exchange()
    agents[0].outgoing.append(protocol.StoreReady(number=1, port=1))

    world.set_want(replicas=2)
    agents[0].hosts_stores = True
    world.run(0.1)

    assert world.current is not None
    assert (world.current.number, world.members()) == (2, [0, 1])


# --- who may join ---


def test_an_agent_whose_pod_is_not_listed_yet_waits_and_joins_when_it_is() -> None:
    world = CoordinatorWorld(replicas=1)
    agent = world.start(0, attempt=2, pod=False)
    world.run(1)
    assert agent.received == []

    world.pods.add((0, 2))
    world.set_want()
    world.run(1)

    assert world.members() == [0]


def test_an_agent_whose_pod_never_appears_is_sent_away() -> None:
    world = CoordinatorWorld(replicas=1)
    agent = world.start(0, pod=False)

    world.run(11)

    assert agent.of(protocol.Shutdown)[0].reason == "superseded"


def test_of_one_slot_the_highest_attempt_wins_and_the_other_is_told() -> None:
    world, agents = a_running_world()

    world.start(1, attempt=1)
    world.run(1)

    assert agents[1].of(protocol.Shutdown)[0].reason == "superseded"
    assert not agents[1].alive
    assert world.current is not None
    assert [(m.slot, m.attempt) for m in world.current.members] == [(0, 0), (2, 0), (1, 1)]
    assert world.causes() == ["WorkerLost"]


def test_a_lower_attempt_that_comes_late_is_told_superseded() -> None:
    world, agents = a_running_world()
    world.kill(agents[1], pod_gone=True)
    world.start(1, attempt=1)
    world.run(2)

    zombie = world.start(1, attempt=0)
    world.exchange()

    assert zombie.of(protocol.Shutdown)[0].reason == "superseded"
    assert len(world.members()) == 3


def test_a_reconnecting_agent_replaces_its_own_connection_and_nothing_ends() -> None:
    world, agents = a_running_world()
    before, old = world.current, agents[1].connection

    world.connect(agents[1])
    world.run(3)

    assert world.closed_by_coordinator == [old]
    assert world.current == before
    assert world.ended() == []


def test_a_second_agent_of_the_same_pod_waits_until_the_first_is_disconnected() -> None:
    world, agents = a_running_world()
    twin = world.start(1, pod=False)
    world.run(1)
    assert twin.received == []
    assert world.ended() == []

    world.cut(agents[1])
    world.run(1)

    assert world.current is not None
    assert {m.agent_id for m in world.current.members} == {agents[0].id, twin.id, agents[2].id}


def test_a_hello_with_another_protocol_version_is_answered_with_an_error_and_closed() -> None:
    world = CoordinatorWorld(replicas=1)
    agent = world.start(0, connect=False)

    world.connect(agent, version=99)

    assert "protocol version 99" in agent.of(protocol.Error)[0].message
    assert len(world.closed_by_coordinator) == 1


def test_an_agent_that_saw_a_newer_operator_is_not_served() -> None:
    world = CoordinatorWorld(replicas=1, epoch=3)
    agent = world.start(0, connect=False)

    world.connect(agent, highest_epoch=4)

    assert agent.connection is None
    assert world.coordinator is not None
    assert world.coordinator.view().agents == ()
