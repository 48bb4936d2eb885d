"""Ranks that wait for an external resource: a standstill is no hang meanwhile."""

from __future__ import annotations

from support.coordinator import a_running_world


def test_ranks_that_wait_do_not_hang() -> None:
    world, agents = a_running_world(hang_timeout=10.0)
    for agent in agents:
        agent.frozen_ranks = True

    world.set_want(ranks_wait=True)
    world.run(60)

    assert world.ended() == []


def test_a_worker_that_is_lost_meanwhile_is_found_all_the_same() -> None:
    world, agents = a_running_world(hang_timeout=10.0)
    world.set_want(ranks_wait=True)

    world.kill(agents[1])
    world.run(2)

    assert world.causes() == ["WorkerLost"]


def test_ranks_that_wait_no_more_may_hang_again() -> None:
    world, agents = a_running_world(hang_timeout=10.0)
    agents[1].frozen_ranks = True
    world.set_want(ranks_wait=True)
    world.run(60)

    world.set_want(ranks_wait=False)
    world.run(12)

    assert world.causes() == ["Hang"]
