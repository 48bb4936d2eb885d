"""Reports of ranks and requests to them, one sentence each."""

from __future__ import annotations

from pretrain_api.messages import reports
from pretrain_api.messages.protocol import Report
from support.coordinator import CoordinatorWorld, a_running_world, a_step
from support.operator.world import a_rolled_back

# --- what ranks ask for ---


def test_a_rejected_checkpoint_is_named_to_the_next_generation_until_one_is_saved() -> None:
    world, agents = a_running_world()
    agents[0].say(reports.CheckpointRejected(checkpoint="c9", message="digest"), world.now)
    world.run(0.5)
    assert world.current is not None
    assert (world.causes(), world.current.rejected) == (["CheckpointRejected"], ("c9",))

    agents[0].say(reports.Saved(step=9, checkpoint="c10", bytes=1, stall_seconds=0, seconds=1), world.now)
    agents[0].say(reports.Failed(rank=0, reason="Killed"), world.now)
    world.run(0.5)

    assert world.current.rejected == ()


def test_a_taken_number_is_followed_by_a_higher_one() -> None:
    world, agents = a_running_world()
    agents[0].say(reports.NumberTaken(highest=41), world.now)

    world.run(0.5)

    assert world.current is not None
    assert (world.current.number, world.causes()) == (42, ["NumberTaken"])


def test_a_job_may_take_over_a_prefix_until_it_has_a_record_of_its_own() -> None:
    world = CoordinatorWorld(replicas=1)
    agent = world.start(0)
    world.exchange()
    agent.say(reports.NumberTaken(highest=7), world.now)
    world.exchange()
    assert world.current is not None
    assert (world.current.number, world.current.may_take_over) == (8, True)

    world.run(1)
    agent.say(reports.Failed(rank=0, reason="Killed"), world.now)
    world.exchange()

    assert (world.current.number, world.current.may_take_over) == (9, False)


def test_after_the_last_step_ranks_and_pods_may_go() -> None:
    world, agents = a_running_world()
    agents[0].say(reports.Finished(step=9, tokens=900, checkpoint="c9"), world.now)
    world.exchange()
    agents[1].say(reports.Failed(rank=1, reason="CollectiveError"), world.now)
    for agent in agents:
        world.kill(agent, pod_gone=True)

    world.run(3)

    assert world.coordinator is not None
    assert world.coordinator.view().finished is not None
    assert world.ended() == []


def test_pids_of_the_ranks_are_known() -> None:
    world, _ = a_running_world()

    assert world.coordinator is not None
    assert world.coordinator.view().pids == {0: 100, 1: 101, 2: 102}


# --- reports ---


def test_a_report_that_comes_twice_counts_once_and_is_acknowledged_twice() -> None:
    world, agents = a_running_world(1)
    coordinator, agent = world.coordinator, agents[0]
    assert coordinator is not None
    assert agent.connection is not None
    report = Report(seq=agent.seq + 1, generation=1, time=world.now, body=a_step(77))

    first = coordinator.received(agent.connection, report, world.now)
    second = coordinator.received(agent.connection, report, world.now)
    later = coordinator.tick(world.now + 0.1)

    assert [len(first.facts), len(second.facts)] == [1, 0]
    acked = [message.seq for _, message in (*first.sends, *second.sends, *later.sends) if message.kind == "acked"]
    assert acked
    assert set(acked) == {report.seq}


def test_reports_of_another_generation_are_dropped_but_acknowledged() -> None:
    world, agents = a_running_world()
    agents[0].say(reports.NumberTaken(highest=99), world.now, generation=17)

    agents[0].say(reports.SaveFailed(step=5, message="full"), world.now)  # What is no step is acknowledged at once.
    world.exchange()

    assert world.ended() == []
    assert agents[0].unacked == []
    assert world.reported(reports.NumberTaken) == []


def test_reports_made_during_an_outage_arrive_exactly_once() -> None:
    world, agents = a_running_world(1)
    world.cut(agents[0])
    world.run(1)
    world.connect(agents[0])
    world.run(1)

    steps = [fact.body.step for fact in world.reported(reports.StepDone)]  # type: ignore[union-attr]

    assert steps == list(range(1, agents[0].step + 1))


def test_the_number_that_ranks_take_by_a_rollback_is_taken() -> None:
    world, agents = a_running_world()
    for agent in agents:
        agent.say(a_rolled_back(7), world.now)
    agents[0].say(reports.Failed(rank=0, reason="Killed"), world.now)

    world.run(0.5)

    assert world.current is not None
    assert world.current.number == 8


def test_a_rollback_takes_the_time_of_a_restore() -> None:
    """No rank hangs during a rollback, and steps may decrease."""
    world, agents = a_running_world()
    before = world.current
    for agent in agents:
        agent.frozen_ranks = True
    agents[0].say(reports.Diverged(step=9, since=8, cause="LossSpike", action="Rollback"), world.now)
    world.run(4)
    for agent in agents:
        agent.say(a_rolled_back(7), world.now)
        agent.frozen_ranks = False
    world.run(1)

    assert world.current == before
    assert world.ended() == []
