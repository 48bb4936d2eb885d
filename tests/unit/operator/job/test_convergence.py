"""Invariants 2 and 4: a crash between any two writes converges to the fixpoint without one; idle jobs write nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from pretrain_api.messages.reports import Finished
from pretrain_operator.job.ports import JobListener
from pretrain_operator.job.service import JobService
from support.operator.world import Crash, FakeChannel, FakeCluster, World, a_job

ROUNDS = 200


@dataclass(frozen=True)
class Fixpoint:
    """The state of a job at rest."""

    pods: tuple[tuple[tuple[int, int], bool], ...]
    phase: str
    reason: str
    workers: tuple[tuple[int, int, str], ...]
    members: tuple[int, ...]


async def settle(world: World) -> None:
    """Run operators, a new one after each crash, until operator and world are at rest."""
    while True:
        try:
            await _serve(world)
            return
        except Crash:
            world.holding = False


async def _serve(world: World) -> None:
    channel = FakeChannel(world)
    service = JobService(FakeCluster(world), channel, JobListener(step=world.records.append), world.clock)
    for _ in range(ROUNDS):
        reconciliation = await service.decide()
        if service.is_due(reconciliation):
            await service.act(reconciliation)
        elif not channel.go_on():
            if reconciliation.decision.requeue_after is None:
                return
            world.now += reconciliation.decision.requeue_after
    raise AssertionError("the job does not come to rest")


def fixpoint(world: World) -> Fixpoint:
    return Fixpoint(
        tuple((identity, pod.alive) for identity, pod in sorted(world.pods.items())),
        world.status.phase,
        world.status.reason,
        tuple((worker.slot, worker.attempt, worker.state) for worker in world.status.workers),
        tuple(member.slot for member in world.generation.members) if world.generation else (),
    )


def kill_a_worker(world: World) -> None:
    world.kill(1)


def scale_down(world: World) -> None:
    world.job = a_job(2)


def scale_up(world: World) -> None:
    world.job = a_job(4)


def suspend(world: World) -> None:
    world.job = a_job(3, suspend=True)


def finish(world: World) -> None:
    world.finished = Finished(step=100, tokens=1, checkpoint="c")


def stop(world: World) -> None:
    world.stopping = True


def freeze(world: World) -> None:
    world.frozen.add((1, 0))


def nothing(world: World) -> None:
    pass


CHANGES = [nothing, kill_a_worker, scale_down, scale_up, suspend, finish, stop, freeze]


async def _after(change: Callable[[World], None], crash_at: int | None = None, crash_after: bool = False) -> World:
    world = World(a_job(3))
    if change is not nothing:
        await settle(world)
        world.writes = 0
        change(world)
    world.crash_at, world.crash_after = crash_at, crash_after
    await settle(world)
    return world


@pytest.mark.parametrize("crash_after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
async def test_a_crash_at_any_write_converges_to_the_fixpoint_without_one(
    change: Callable[[World], None], crash_after: bool
) -> None:
    calm = await _after(change)

    for write in range(1, calm.writes + 1):
        shaken = await _after(change, write, crash_after)

        assert fixpoint(shaken) == fixpoint(calm), f"write {write}"
        assert len(set(shaken.created)) == len(shaken.created), "an attempt was used twice"


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
async def test_an_idle_job_costs_zero_writes_also_for_a_new_operator(change: Callable[[World], None]) -> None:
    world = await _after(change)
    before = world.writes

    world.now += 3600.0
    await settle(world)

    assert world.writes == before


async def test_the_scenarios_end_where_they_should() -> None:
    phases = {change.__name__: (await _after(change)) for change in CHANGES}

    assert {name: world.status.phase for name, world in phases.items()} == {
        "nothing": "Training",
        "kill_a_worker": "Training",
        "scale_down": "Training",
        "scale_up": "Training",
        "suspend": "Suspended",
        "finish": "Succeeded",
        "stop": "Suspended",
        "freeze": "Training",
    }
    assert phases["kill_a_worker"].alive() == {(0, 0), (1, 1), (2, 0)}
    assert set(phases["kill_a_worker"].pods) == {(0, 0), (1, 1), (2, 0)}
    assert phases["freeze"].alive() == {(0, 0), (1, 1), (2, 0)}
    assert phases["scale_down"].alive() == {(0, 0), (1, 0)}
    assert phases["suspend"].pods == {}
    assert phases["finish"].alive() == set()
