"""A restarted coordinator without memory, one sentence each."""

from __future__ import annotations

from pretrain_api.messages import protocol
from pretrain_api.messages.protocol import Heartbeat
from pretrain_operator.facts.fact import GenerationEnded
from support.coordinator import a_running_world, a_want
from support.operator.world import a_rolled_back


def test_a_restarted_coordinator_adopts_the_running_generation_without_disturbing_it() -> None:
    world, agents = a_running_world()
    before, received = world.current, [len(agent.of(protocol.Formed)) for agent in agents]
    steps = agents[0].step
    world.crash()
    world.run(3)
    world.epoch += 1
    world.boot()
    for agent in agents:
        world.connect(agent)
        world.run(0.7)
    world.run(3)

    assert world.current == before
    assert world.ended() == []
    assert [len(agent.of(protocol.Formed)) for agent in agents] == received
    assert agents[0].step > steps + 60


def test_a_member_that_does_not_come_back_to_a_restarted_coordinator_is_lost_when_steps_stand_still() -> None:
    world, agents = a_running_world()
    for agent in agents:
        agent.reports_steps = False
    world.crash()
    agents[2].stopped = True
    world.boot()
    for agent in agents[:2]:
        world.connect(agent)
    world.run(2)
    assert world.ended() == []

    world.run(2)

    assert world.causes() == ["WorkerLost"]
    assert world.members() == [0, 1]


def test_a_member_lost_before_its_coordinator_came_is_lost_since_the_last_step() -> None:
    world, agents = a_running_world()
    world.crash()
    agents[2].stopped = True
    stopped_at = world.now
    world.run(6)
    world.epoch += 1
    world.boot()
    for agent in agents[:2]:
        world.connect(agent)
    world.run(1.9)
    assert world.ended() == []

    world.run(0.3)

    [ended] = world.ended()
    assert (ended.cause, ended.slot) == ("WorkerLost", 2)
    assert stopped_at - 0.1 <= ended.fault_time <= stopped_at + 0.1
    world.run(1)
    assert world.members() == [0, 1]


def test_members_that_stand_still_are_all_waited_for_by_a_restarted_coordinator() -> None:
    world, agents = a_running_world()
    world.crash()
    agents[2].frozen_ranks = True
    world.run(6)
    world.epoch += 1
    world.boot()
    for agent in agents:
        world.connect(agent)
        world.run(0.6)
    world.run(5)

    assert world.ended() == []


def test_a_restarted_coordinator_lets_members_come_before_it_forms_with_spares() -> None:
    world, agents = a_running_world(2)
    spares = [world.start(2), world.start(3)]
    before = world.current
    world.crash()
    world.boot()
    for spare in spares:
        world.connect(spare)
    world.run(1)
    for agent in agents:
        world.connect(agent)
    world.run(5)

    assert world.current == before
    assert world.ended() == []


def test_a_generation_below_the_highest_known_number_is_not_taken_over() -> None:
    world, agents = a_running_world()
    world.crash()
    world.known_number = 2  # Its successor was being formed.
    world.boot()
    for agent in agents:
        world.connect(agent)
    world.run(0.1)

    assert world.current is not None
    assert world.current.number == 3


def test_members_that_claim_different_generations_get_a_new_number() -> None:
    world, agents = a_running_world()
    generation = world.current
    assert generation is not None
    world.crash()
    newer = generation.model_copy(update={"number": 5})
    agents[2].generation, agents[2].highest = newer, 5
    world.boot()
    for agent in agents:
        world.connect(agent)
    world.run(1)

    assert world.current is not None
    assert world.current.number == 6
    assert world.causes() == ["Disagreement"]
    assert [agent.runs for agent in agents] == [6, 6, 6]


def test_the_leftover_of_an_older_generation_does_not_stop_the_newer_one() -> None:
    world, agents = a_running_world()
    zombie_generation = world.current
    world.kill(agents[2], pod_gone=True)
    world.run(1)
    newer = world.current
    assert newer is not None
    world.crash()
    zombie = world.start(2, attempt=1, connect=False)
    assert zombie_generation is not None
    leftover = zombie_generation.members[2].model_copy(update={"agent_id": zombie.id, "attempt": 1})
    zombie.generation = zombie_generation.model_copy(update={"members": (leftover,)})
    world.boot()
    world.connect(zombie)
    for agent in agents[:2]:
        world.connect(agent)
    world.run(0.05)

    assert world.current == newer
    assert zombie.runs == 0


def test_heartbeats_alone_change_nothing() -> None:
    world, agents = a_running_world()
    assert world.coordinator is not None
    assert agents[0].connection is not None

    output = world.coordinator.received(agents[0].connection, Heartbeat(generation=1, step=9), world.now)

    assert (output.sends, output.closes, output.facts) == ((), (), ())


def test_an_ended_generation_says_whether_it_was_meant() -> None:
    assert GenerationEnded(time=1, number=1, cause="Resized", step=1, fault_time=1).intended
    assert not GenerationEnded(time=1, number=1, cause="Hang", step=1, fault_time=1).intended
    assert a_want().running


def test_ranks_that_took_a_higher_number_by_a_rollback_are_taken_over_too() -> None:
    world, agents = a_running_world()
    before = world.current
    for agent in agents:
        agent.say(a_rolled_back(7), world.now)
        agent.rolled_to = agent.highest = 7
    world.run(1)
    world.crash()
    world.run(1)
    world.epoch += 1
    world.boot()
    for agent in agents:
        world.connect(agent)
    world.run(3)

    assert world.current == before
    assert world.ended() == []
