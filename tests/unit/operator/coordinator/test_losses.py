"""The end of generations by faults: lost contact is evidence and not a verdict, one sentence each."""

from __future__ import annotations

import pytest

from pretrain_api.messages import protocol, reports
from support.coordinator import CoordinatorWorld, a_running_world

# --- losses ---


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_worker_starts_the_next_generation_with_the_survivors_in_their_order(victim: int) -> None:
    world, agents = a_running_world()
    killed_at = world.now

    world.kill(agents[victim])
    assert world.run_until(lambda: world.current is not None and world.current.number == 2, 2)

    assert world.members() == [slot for slot in range(3) if slot != victim]
    [ended] = world.ended()
    assert (ended.cause, ended.slot, ended.node) == ("WorkerLost", victim, f"node-{victim}")
    assert ended.fault_time == killed_at
    assert world.now - killed_at < 0.5


def test_a_member_whose_pod_is_gone_ends_the_generation_at_once() -> None:
    world, agents = a_running_world()

    world.lose_pod(agents[2])

    assert world.causes() == ["WorkerLost"]


def test_a_spare_takes_the_place_of_a_lost_member_at_once() -> None:
    world, agents = a_running_world(3)
    spare = world.start(3)
    world.run(1)
    assert world.ended() == []
    assert spare.runs == 0

    world.kill(agents[0], pod_gone=True)
    world.run(0.2)

    assert world.members() == [1, 2, 3]


def test_with_shrink_after_the_survivors_wait_for_a_replacement_without_ranks() -> None:
    world, agents = a_running_world(shrink_after=5.0)
    world.kill(agents[1], pod_gone=True)
    world.run(1)
    assert world.current is None
    assert agents[0].runs == agents[2].runs == 0
    assert agents[0].of(protocol.Dissolved)[0].reason == "WorkerLost"

    world.start(1, attempt=1)
    world.run(0.1)

    assert world.members() == [0, 2, 1]


def test_with_shrink_after_the_survivors_resume_without_it_after_that_time() -> None:
    world, agents = a_running_world(shrink_after=5.0)
    world.kill(agents[1], pod_gone=True)

    world.run(5.5)

    assert world.members() == [0, 2]


def test_below_the_minimum_the_survivors_are_dissolved_and_wait() -> None:
    world, agents = a_running_world(min=3)

    world.kill(agents[1], pod_gone=True)
    world.run(20)

    assert world.current is None
    assert agents[0].alive
    assert agents[0].runs == 0


def test_a_failed_rank_ends_the_generation_at_once_and_its_agent_stays() -> None:
    world, agents = a_running_world()
    agents[1].failed = True
    agents[1].say(reports.Failed(rank=1, exit_code=-9, reason="Killed"), world.now)

    world.run(0.2)

    [ended] = world.ended()
    assert (ended.cause, ended.slot) == ("RankFailed", 1)
    assert world.members() == [0, 1, 2]


def test_collective_errors_wait_for_the_failure_that_explains_them() -> None:
    world, agents = a_running_world()
    for agent in agents:
        agent.failed = True
    agents[0].say(reports.Failed(rank=0, reason="CollectiveError"), world.now)
    world.exchange()
    assert world.ended() == []

    agents[2].say(reports.Failed(rank=2, reason="OutOfMemory", message="GPU 0"), world.now)
    world.exchange()

    [ended] = world.ended()
    assert (ended.cause, ended.slot, ended.message) == ("RankFailed", 2, "rank 2: OutOfMemory: GPU 0")


def test_collective_errors_without_a_cause_end_the_generation_and_blame_no_member() -> None:
    world, agents = a_running_world()
    for agent in agents:
        agent.failed = True
    agents[0].say(reports.Failed(rank=0, reason="CollectiveError"), world.now)

    world.run(0.15)

    [ended] = world.ended()
    assert (ended.cause, ended.slot) == ("RankFailed", None)


def test_a_failure_that_no_restart_mends_is_shown_and_nothing_is_formed_any_more() -> None:
    world, agents = a_running_world()
    agents[0].say(reports.Failed(rank=0, reason="ConfigInvalid", retryable=False), world.now)

    world.run(5)

    assert world.coordinator is not None
    view = world.coordinator.view()
    assert view.fatal is not None
    assert (view.fatal.reason, view.current, view.forming) == ("ConfigInvalid", None, False)
    assert all(agent.runs == 0 for agent in agents)


def test_a_final_failure_that_comes_after_the_errors_of_its_victims_still_counts() -> None:
    world, agents = a_running_world()
    for agent in agents:
        agent.failed = True
    agents[0].say(reports.Failed(rank=0, reason="CollectiveError"), world.now)
    world.run(0.15)

    agents[1].say(reports.Failed(rank=1, reason="ConfigInvalid", retryable=False), world.now, generation=1)
    world.exchange()

    assert world.coordinator is not None
    assert world.coordinator.view().fatal is not None


# --- lost contact is evidence, not a verdict ---


@pytest.mark.parametrize("away", [0, 1])
def test_a_broken_connection_ends_nothing_while_steps_advance(away: int) -> None:
    world, agents = a_running_world()

    world.cut(agents[away])
    world.run(10)

    assert world.ended() == []


def test_a_broken_connection_and_steps_that_stand_still_mean_a_lost_worker() -> None:
    world, agents = a_running_world()
    agents[1].frozen_ranks = True
    world.cut(agents[1])
    world.run(0.45)
    assert world.ended() == []

    world.run(0.25)

    assert world.causes() == ["WorkerLost"]
    assert world.members() == [0, 2]


def test_a_member_that_comes_back_in_time_ends_nothing() -> None:
    world, agents = a_running_world()
    agents[1].frozen_ranks = True
    world.cut(agents[1])
    world.run(0.2)
    world.connect(agents[1])
    agents[1].frozen_ranks = False

    world.run(5)

    assert world.ended() == []


def test_a_stopped_worker_is_found_and_left_out() -> None:
    world, agents = a_running_world()

    agents[2].stopped = True
    world.run(1.5)

    [ended] = world.ended()
    assert (ended.cause, ended.slot) == ("WorkerSilent", 2)
    assert world.members() == [0, 1]


def test_a_worker_stopped_before_the_first_step_is_found_as_well() -> None:
    world = CoordinatorWorld(replicas=3)
    agents = [world.start(slot) for slot in range(3)]
    agents[1].stopped = True

    world.run(20)

    assert world.members() == [0, 2]


def test_a_stopped_worker_that_wakes_up_kills_its_old_ranks_and_joins_again() -> None:
    world, agents = a_running_world()
    agents[2].stopped = True
    world.run(3)

    agents[2].stopped = False
    world.run(2)

    assert agents[2].of(protocol.Dissolved)
    assert world.members() == [0, 1, 2]


def test_silence_of_an_agent_ends_nothing_while_steps_advance() -> None:
    world, agents = a_running_world()
    assert world.coordinator is not None
    for _ in range(100):
        world.slice()
        agents[1].outgoing.clear()
        agents[1].beat_at = world.now

    assert world.ended() == []


def test_while_no_agent_is_heard_no_generation_ends() -> None:
    world, agents = a_running_world()
    for agent in agents:
        agent.frozen_ranks = True
        world.cut(agent)

    world.run(120)

    assert world.ended() == []


def test_a_broken_connection_proves_nothing_when_no_agent_was_heard_since() -> None:
    world, agents = a_running_world()
    world.cut(agents[1])
    world.train = lambda: None  # type: ignore[method-assign]
    for _ in range(16):
        for agent in agents:
            agent.beat_at = world.now  # The network swallows what they say.
        world.slice()

    assert world.ended() == []


def test_rank_0_may_be_away_while_the_heartbeats_of_others_come_slowly() -> None:
    world, agents = a_running_world()
    world.cut(agents[0])
    for _ in range(20):
        for agent in agents:
            agent.beat_at = world.now
        world.run(0.25)
        for agent in agents:
            agent.beat_at = 0.0
        world.run(0.15)

    assert world.ended() == []


def test_after_an_outage_members_may_come_back_one_by_one() -> None:
    world, agents = a_running_world()
    for agent in agents:
        agent.frozen_ranks = True
        world.cut(agent)
    world.run(10)
    for agent in agents:
        world.connect(agent)
        world.run(0.8)
    for agent in agents:
        agent.frozen_ranks = False

    world.run(5)

    assert world.ended() == []


def test_a_coordinator_that_was_itself_stopped_does_not_blame_the_agents() -> None:
    world, _ = a_running_world()
    world.now += 30

    assert world.coordinator is not None
    world.carry_out(world.coordinator.tick(world.now))
    world.run(3)

    assert world.ended() == []


def test_ranks_that_hang_although_all_agents_answer_are_restarted() -> None:
    world, agents = a_running_world(hang_timeout=10.0)
    agents[1].frozen_ranks = True
    world.run(9)
    assert world.ended() == []

    world.run(2)

    assert world.causes() == ["Hang"]
    assert world.members() == [0, 1, 2]


def test_an_evaluation_is_no_hang() -> None:
    world, agents = a_running_world(hang_timeout=10.0)
    agents[1].frozen_ranks = True
    for _ in range(4):
        world.run(6)
        agents[0].say(reports.Evaluated(step=agents[0].step, losses={}, seconds=6), world.now)

    assert world.ended() == []


def test_an_evaluation_that_takes_longer_than_steps_may_is_no_hang_and_what_follows_may_be_one() -> None:
    world, agents = a_running_world(hang_timeout=10.0)
    agents[1].frozen_ranks = True
    agents[0].say(reports.Evaluating(step=agents[0].step), world.now)
    world.run(60)
    assert world.ended() == []

    agents[1].frozen_ranks = False
    world.run(1)
    agents[1].frozen_ranks = True
    world.run(12)
    assert world.causes() == ["Hang"]


def test_an_agent_that_came_back_without_its_ranks_is_lost_when_steps_stand_still() -> None:
    world, agents = a_running_world()
    world.cut(agents[1])
    agents[1].generation = None
    world.connect(agents[1])

    world.run(2)

    assert world.causes() == ["WorkerLost"]
    assert world.members() == [0, 1, 2]


def test_a_member_that_missed_its_generation_is_told_again() -> None:
    world = CoordinatorWorld(replicas=2)
    first = world.start(0, connect=False)
    second = world.start(1, connect=False)
    world.connect(first)
    world.connect(second)
    world.deliver(first)  # Its store listens, the generation goes out ...
    for agent in (first, second):
        world.cut(agent)  # ... and is lost on the way.
        world.connect(agent)

    world.run(2)

    assert (first.runs, second.runs) == (1, 1)
    assert world.ended() == []


def test_the_rest_of_a_broken_replica_waits_until_it_is_whole_again() -> None:
    world, agents = a_running_world(4, replica_quantum=2)
    world.kill(agents[1])

    world.run(2)
    assert world.members() == [0, 2]
    assert agents[3].runs == 0

    world.start(1, 1)
    world.run(2)
    assert sorted(world.members()) == [0, 1, 2, 3]
