"""Planned changes: grow, shrink, leave, suspend and end, one sentence each."""

from __future__ import annotations

from pretrain_api.messages import protocol, reports
from pretrain_api.messages.protocol import Leaving
from support.coordinator import CoordinatorWorld, a_running_world, a_step


def test_a_new_worker_joins_at_a_step_boundary_without_a_lost_step() -> None:
    world, agents = a_running_world(2, replicas=3)
    world.start(2)
    world.run(2)

    [ended] = world.ended()
    assert (ended.cause, ended.intended, ended.step) == ("WorkerJoined", True, world.saved_step)
    assert world.members() == [0, 1, 2]
    assert world.current is not None
    assert world.current.reason == "WorkerJoined"
    assert agents[0].of(protocol.Command)[0].hold_seconds == 30


def test_workers_that_join_together_cost_one_generation() -> None:
    world, _ = a_running_world(1, replicas=3)
    world.start(1)
    world.run(0.05)
    world.start(2)

    world.run(2)

    assert world.members() == [0, 1, 2]
    assert world.causes() == ["WorkerJoined"]


def test_a_generation_that_has_not_done_a_step_is_not_disturbed_for_growing() -> None:
    world = CoordinatorWorld(replicas=2, formation_wait=0.0)
    agent = world.start(0)
    world.run(0.05)
    agent.frozen_ranks = True
    world.start(1)

    world.run(10)

    assert agent.of(protocol.Command) == []
    assert world.ended() == []


def test_a_hold_that_was_over_too_early_is_tried_again_later() -> None:
    world, agents = a_running_world(1, replicas=2)
    world.start(1)
    world.train = lambda: None  # type: ignore[method-assign]
    world.run(0.5)
    [command] = agents[0].of(protocol.Command)
    agents[0].say(reports.Resumed(command_id=command.id, step=5), world.now)
    agents[0].command = None
    world.run(1)
    assert len(agents[0].of(protocol.Command)) == 1

    world.run(6)

    assert len(agents[0].of(protocol.Command)) == 2


def test_a_hold_that_is_over_is_not_taken_for_one_that_lasts() -> None:
    world, agents = a_running_world()
    world.train = lambda: None  # type: ignore[method-assign]
    held = reports.Held(command_id="x", step=agents[0].step, checkpoint="c")
    resumed = reports.Resumed(command_id="x", step=agents[0].step)
    agents[0].say(held, world.now)
    agents[0].say(resumed, world.now)
    agents[1].say(held, world.now)  # This rank's words took longer.
    world.exchange()
    world.set_want(replicas=2)
    world.run(0.1)
    assert world.ended() == []

    agents[0].say(reports.Held(command_id="y", step=agents[0].step, checkpoint="c"), world.now)
    agents[0].say(a_step(agents[0].step + 1), world.now)
    world.set_want(replicas=3)
    world.exchange()
    world.run(2)

    assert world.ended() == []


def test_a_hold_counts_once_rank_0_reported_its_step() -> None:
    world, agents = a_running_world()
    world.train = lambda: None  # type: ignore[method-assign]
    world.exchange()
    step = agents[0].step + 1
    world.set_want(replicas=2, remove_slots=frozenset({2}))
    agents[1].say(reports.Held(command_id="x", step=step, checkpoint="c"), world.now)
    world.run(0.5)
    assert world.ended() == []

    agents[0].say(a_step(step), world.now)
    world.run(0.5)

    assert world.causes() == ["Resized"]
    assert world.reported(reports.StepDone)[-1].body.step == step


def test_a_step_that_was_done_before_the_end_and_told_after_it_is_not_lost() -> None:
    world, agents = a_running_world()
    world.train = lambda: None  # type: ignore[method-assign]
    world.exchange()
    step = agents[0].step + 1
    world.kill(agents[1], pod_gone=True)
    world.exchange()
    assert world.causes() == ["WorkerLost"]

    agents[0].say(a_step(step), world.now, generation=1)
    world.exchange()

    assert world.reported(reports.StepDone)[-1].body.step == step


def test_ranks_that_hold_for_a_worker_that_is_gone_again_are_set_going() -> None:
    world, agents = a_running_world(1, replicas=2)
    joiner = world.start(1)
    world.run_until(lambda: bool(agents[0].of(protocol.Command)))
    world.kill(joiner, pod_gone=True)

    world.run(2)
    steps = world.steps()
    world.run(1)

    assert world.members() == [0]
    assert world.steps() > steps


def test_slots_to_be_removed_leave_at_a_step_boundary() -> None:
    world, agents = a_running_world()
    world.set_want(replicas=2, remove_slots=frozenset({0}))

    world.run(1)

    assert world.causes() == ["Resized"]
    assert world.members() == [1, 2]
    assert agents[0].runs == 0


def test_a_worker_that_gets_sigterm_leaves_after_a_checkpoint_and_is_no_incident() -> None:
    world, agents = a_running_world()
    world.terminate(agents[1])
    world.run(1)
    world.kill(agents[1], pod_gone=True)
    world.run(1)

    [ended] = world.ended()
    assert (ended.cause, ended.slot, ended.intended) == ("WorkerLeft", 1, True)
    assert ended.step == world.saved_step
    assert world.members() == [0, 2]


def test_a_leaving_worker_that_dies_before_its_checkpoint_is_lost() -> None:
    world, agents = a_running_world()
    agents[1].leaving = True
    agents[1].outgoing.append(Leaving())
    world.exchange()

    world.kill(agents[1])
    world.run(1)

    assert world.causes() == ["WorkerLost"]


def test_held_may_be_known_before_the_reason_for_it() -> None:
    world, agents = a_running_world()
    world.terminate(agents[1])
    leaving = agents[1].outgoing.pop()
    world.run(0.2)
    assert world.ended() == []

    agents[1].outgoing.append(leaving)
    world.exchange()

    assert world.causes() == ["WorkerLeft"]


def test_a_replacement_does_not_push_out_a_worker_that_takes_its_last_checkpoint() -> None:
    world, agents = a_running_world()
    world.terminate(agents[1])
    world.deliver(agents[1])
    replacement = world.start(1, attempt=1)
    assert replacement.received == []

    world.run(0.2)

    assert world.causes()[:1] == ["WorkerLeft"]


def test_a_suspended_job_takes_a_checkpoint_and_holds_and_resumes_later() -> None:
    world, agents = a_running_world()
    assert world.coordinator is not None
    world.set_want(running=False)
    world.run(1)

    assert world.causes() == ["Suspended"]
    view = world.coordinator.view()
    assert (view.holding, view.current, view.forming) == (True, None, False)
    assert all(agent.alive and agent.runs == 0 for agent in agents)

    world.set_want(running=True)
    world.run(1)

    assert world.current is not None
    assert (world.current.reason, world.members()) == ("Resumed", [0, 1, 2])


def test_a_job_that_ends_shuts_every_agent_down_and_those_that_come_later() -> None:
    world, agents = a_running_world()
    assert world.coordinator is not None
    world.carry_out(world.coordinator.end("succeeded", "done", world.now))
    late = world.start(3)
    world.exchange()

    assert [agent.of(protocol.Shutdown)[0].reason for agent in (*agents, late)] == ["succeeded"] * 4
    assert world.coordinator.next_deadline() is None


def test_a_suspended_job_admits_new_agents_when_it_is_resumed() -> None:
    world, agents = a_running_world(2)
    world.set_want(running=False)
    world.run(1)
    world.end("suspended")
    world.run(0.2)
    assert not any(agent.alive for agent in agents)

    world.pods.clear()
    world.set_want(running=True)
    for slot in range(2):
        world.start(slot, 1)
    world.run(2)

    assert world.members() == [0, 1]
    assert world.current is not None
    assert (world.current.number, world.current.reason) == (2, "Resumed")


def test_an_agent_that_was_told_to_go_is_in_no_generation_although_it_is_still_connected() -> None:
    world, agents = a_running_world(2)
    world.set_want(running=False)
    world.run(1)
    agents[0].stopped = True  # it has not read yet that it must go
    world.end("suspended")

    world.set_want(running=True)
    world.start(1, 1)
    world.run(2)

    assert world.members() == [1]


def test_an_agent_that_did_not_hear_that_it_was_to_go_is_welcome_when_the_job_is_resumed() -> None:
    world, agents = a_running_world(2)
    world.set_want(running=False)
    world.run(1)
    agents[0].stopped = True
    world.end("suspended")
    world.cut(agents[0])  # what it was told is lost
    agents[0].stopped = False

    world.set_want(running=True)
    world.connect(agents[0])
    world.run(2)

    assert world.members() == [0]


def test_a_job_that_is_over_is_not_resumed() -> None:
    world, _ = a_running_world(2)
    world.end("succeeded")
    world.run(0.2)

    world.set_want(running=True)
    late = world.start(2)
    world.run(0.2)

    assert not late.alive
    assert world.current is None
