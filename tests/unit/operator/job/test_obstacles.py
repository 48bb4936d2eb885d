"""The service under refusals of the cluster, interruptions of its own, and an expired TTL."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from pretrain_api.messages.reports import Blocked, Finished
from pretrain_operator.cluster import Placement, PodRefused
from pretrain_operator.decide.conditions import condition_of
from pretrain_operator.job.ports import JobListener
from pretrain_operator.job.service import JobService
from support.operator.world import NOON, FakeChannel, FakeCluster, World, a_job, a_stuck_pod


class QuotaCluster(FakeCluster):
    """A cluster with a quota of pods."""

    def __init__(self, world: World, quota: int) -> None:
        super().__init__(world)
        self.quota = quota
        self.asked = 0
        self.placements: list[Placement] = []

    async def create_pod(self, slot: int, attempt: int, placement: Placement) -> None:
        self.asked += 1
        self.placements.append(placement)
        if len(self.world.alive()) >= self.quota:
            raise PodRefused("QuotaExceeded", f"worker {slot} cannot be created: exceeded quota; raise it")
        await super().create_pod(slot, attempt, placement)


class Stage:
    def __init__(self, world: World, quota: int = 100) -> None:
        self.world = world
        self.cluster = QuotaCluster(world, quota)
        self.anew()

    def anew(self) -> None:
        """Replace the operator by a new one."""
        self.channel = FakeChannel(self.world)
        self.service = JobService(self.cluster, self.channel, JobListener(), self.world.clock)

    async def round(self) -> float | None:
        """Reconcile once; returns the requeue time."""
        reconciliation = await self.service.decide()
        if self.service.is_due(reconciliation):
            assert await self.service.act(reconciliation), "nothing is to be tried again by itself"
        return reconciliation.decision.requeue_after

    async def settle(self) -> float | None:
        for _ in range(100):
            reconciliation = await self.service.decide()
            if self.service.is_due(reconciliation):
                await self.service.act(reconciliation)
            elif not self.channel.go_on():
                return reconciliation.decision.requeue_after
        raise AssertionError("it does not come to rest")

    @property
    def reasons(self) -> list[str]:
        return [event.reason for event in self.world.events]

    def blocked(self) -> tuple[str, str]:
        condition = condition_of(self.world.status.conditions, "Blocked")
        return (condition.status, condition.reason) if condition is not None else ("", "")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_refused_pod_is_shown_and_told_once_while_the_rest_trains_on() -> None:
    stage = Stage(World(a_job(3, minimum=2)), quota=2)

    await stage.settle()
    stage.world.generation = None
    for _ in range(6):
        wait = await stage.settle()
        assert wait is not None
        stage.world.now += wait

    assert stage.blocked() == ("True", "QuotaExceeded")
    assert stage.reasons.count("QuotaExceeded") == 1
    assert "ClusterError" not in stage.reasons
    assert stage.world.alive() == {(0, 0), (1, 0)}
    assert stage.world.status.bookkeeping.restarts == ()


async def test_a_refused_pod_is_retried_with_backoff_and_created_when_the_cause_is_fixed() -> None:
    stage = Stage(World(a_job(2, minimum=2)), quota=1)
    waits: list[float | None] = []
    for _ in range(6):
        waits.append(await stage.settle())
        stage.world.now += waits[-1] or 0.0

    assert stage.world.status.phase == "Pending"
    assert stage.world.status.reason == "QuotaExceeded"
    assert waits == [1.0, 2.0, 4.0, 8.0, 15.0, 15.0]
    stage.cluster.quota = 2
    await stage.settle()

    assert stage.world.status.phase == "Training"
    assert stage.blocked() == ("False", "NothingInTheWay")
    assert "Unblocked" in stage.reasons
    assert stage.world.status.bookkeeping.refused is None


async def test_a_refusal_of_a_pod_that_is_no_longer_needed_delays_no_later_pod() -> None:
    stage = Stage(World(a_job(2, minimum=1)), quota=1)
    for _ in range(5):
        stage.world.now += await stage.settle() or 0.0
    stage.world.job = a_job(1)
    await stage.settle()
    asked = stage.cluster.asked

    stage.world.job = a_job(2)
    await stage.settle()

    assert stage.cluster.asked == asked + 1
    assert stage.blocked() == ("True", "QuotaExceeded")


async def test_once_a_pod_was_refused_no_other_is_tried_in_the_same_round() -> None:
    stage = Stage(World(a_job(5)), quota=0)

    await stage.settle()

    assert stage.cluster.asked == 1


async def test_a_new_operator_does_not_tell_of_the_same_refusal_again() -> None:
    stage = Stage(World(a_job(2, minimum=2)), quota=1)
    await stage.settle()
    before = stage.world.writes

    stage.anew()
    await stage.settle()

    assert stage.blocked() == ("True", "QuotaExceeded")
    assert stage.reasons.count("QuotaExceeded") == 1
    assert stage.world.writes == before


async def test_a_job_that_waits_for_what_somebody_must_mend_costs_no_writes() -> None:
    stage = Stage(World(a_job(1)))
    stage.channel.go_on = lambda: False
    await stage.round()
    stage.world.pods[0, 0] = a_stuck_pod(0, "ImagePullBackOff", "no such image")
    await stage.round()
    before = stage.world.writes

    for _ in range(5):
        stage.world.now += 600
        await stage.round()

    assert stage.world.status.reason == "ImagePullBackOff"
    assert stage.world.writes == before


async def test_a_bad_image_is_fixed_by_a_change_of_the_spec() -> None:
    stage = Stage(World(a_job(1, generation=1)))
    await stage.round()
    stage.world.pods[0, 0] = a_stuck_pod(0, "ImagePullBackOff", "no such image")
    await stage.round()
    assert stage.world.alive() == {(0, 0)}

    stage.world.job = a_job(1, generation=2)
    await stage.settle()

    assert stage.world.alive() == {(0, 1)}
    assert stage.world.status.phase == "Training"
    assert stage.world.status.bookkeeping.slots[0].failures == 0


async def test_a_pod_kept_from_a_silent_node_is_recorded_as_such_also_for_the_next_operator() -> None:
    stage = Stage(World(a_job(3)))
    await stage.settle()
    stage.world.frozen.add((1, 0))

    await stage.settle()

    assert stage.cluster.placements[-1].never == {"node-1"}
    memory = {slot.slot: slot for slot in stage.world.status.bookkeeping.slots}
    assert (memory[1].attempt, memory[1].kept_from) == (1, ("node-1",))
    assert [suspect.node for suspect in stage.world.status.suspects] == ["node-1"]


async def test_what_ranks_wait_for_is_shown_and_the_coordinator_knows() -> None:
    stage = Stage(World(a_job(1)))
    await stage.settle()

    stage.channel.say(Blocked(reason="DataMissing", message="no corpus at s3://web; put it there"))
    await stage.round()

    assert (stage.world.status.phase, stage.world.status.reason) == ("Recovering", "DataMissing")
    assert stage.channel.want is not None
    assert stage.channel.want.ranks_wait
    assert stage.reasons[-1] == "DataMissing"


# --- the operator's own soundness -------------------------------------------------------------------------------------


async def test_an_operator_that_was_stopped_for_a_minute_does_not_blame_the_only_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(World(a_job(1)))
    await stage.settle()
    silent_since = stage.world.now
    view = stage.channel.view
    stage.channel.view = lambda: replace(
        view(), agents=tuple(replace(agent, last_heard=silent_since) for agent in view().agents)
    )
    looks, four_looks, looked_at = 0, asyncio.Event(), asyncio.Event()

    async def stopped(timeout: float | None) -> None:
        nonlocal looks
        looks += 1
        stage.world.now += 60 if looks == 1 else 5
        if looks == 4:
            four_looks.set()
            await looked_at.wait()
        await asyncio.sleep(0)

    monkeypatch.setattr(
        "pretrain_operator.job.service.ReconcileTrigger.wait", lambda trigger, timeout: stopped(timeout)
    )
    serving = asyncio.create_task(stage.service.run())
    await four_looks.wait()
    assert stage.world.created == [(0, 0)]

    looked_at.set()
    await until(lambda: (0, 1) in stage.world.created)

    assert stage.world.now - silent_since >= 60 + 30
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


# --- the end ----------------------------------------------------------------------------------------------------------


async def test_a_job_with_a_time_after_its_end_is_served_until_it_is_deleted() -> None:
    stage = Stage(World(a_job(1, ttl="1h")))
    await stage.settle()
    stage.world.finished = Finished(step=1, tokens=1, checkpoint="c")
    await stage.settle()
    serving = asyncio.create_task(stage.service.run())
    await until(lambda: stage.world.status.phase == "Succeeded")

    stage.world.now += 3500
    stage.cluster.tell()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not serving.done()
    assert not stage.world.deleted
    stage.world.now += 200
    stage.cluster.tell()
    async with asyncio.timeout(20):
        status = await serving

    assert stage.world.deleted
    assert status.phase == "Succeeded"
    assert stage.world.now > NOON + 3600
