"""The loop of the service: urgent changes at once, others rate-limited, errors retried."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from pretrain_api.messages.reports import Finished
from pretrain_api.status.job import JobStatus
from pretrain_operator.cluster import Placement
from pretrain_operator.facts.fact import GenerationAnnounced, GenerationEnded
from pretrain_operator.job.ports import JobListener
from pretrain_operator.job.service import JobService
from support.operator.world import FakeChannel, FakeCluster, World, a_generation, a_job, a_pod, a_restore, a_step


class Stage:
    """A service with its fakes; three workers train by default."""

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World(a_job(3))
        self.cluster = FakeCluster(self.world)
        self.channel = FakeChannel(self.world)
        self.service = JobService(
            self.cluster, self.channel, JobListener(step=self.world.records.append), self.world.clock
        )

    async def settle(self) -> None:
        for _ in range(100):
            reconciliation = await self.service.decide()
            if self.service.is_due(reconciliation):
                await self.service.act(reconciliation)
            elif not self.channel.go_on():
                return
        raise AssertionError("it does not come to rest")

    @property
    def reasons(self) -> list[str]:
        return [event.reason for event in self.world.events]


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_job_is_served_from_its_first_pod_to_its_end() -> None:
    stage = Stage()
    serving = asyncio.create_task(stage.service.run())

    await until(lambda: stage.channel.want is not None and len(stage.world.alive()) == 3)
    while stage.channel.go_on():
        stage.channel.changed()
    await until(lambda: stage.world.status.phase == "Training")
    stage.world.finished = Finished(step=1, tokens=1, checkpoint="c")
    stage.channel.changed()
    async with asyncio.timeout(20):
        status = await serving

    assert status.phase == "Succeeded"
    assert stage.world.status == status
    assert stage.channel.ends == ["succeeded"]
    assert not stage.world.alive()


async def test_a_stopped_job_ends_suspended_with_a_checkpoint() -> None:
    stage = Stage()
    await stage.settle()
    serving = asyncio.create_task(stage.service.run())

    stage.world.stopping = True
    stage.cluster.tell()
    await until(lambda: stage.channel.want is not None and not stage.channel.want.running)
    assert stage.channel.ends == []
    stage.channel.go_on()
    stage.channel.changed()
    async with asyncio.timeout(20):
        status = await serving

    assert (status.phase, status.reason) == ("Suspended", "Stopped")
    assert stage.channel.ends == ["suspended"]


async def test_the_loss_of_a_pod_reaches_the_coordinator_while_a_write_hangs() -> None:
    stage = Stage()
    await stage.settle()
    hanging = asyncio.Event()
    wrote = asyncio.Event()

    async def write_status(status: JobStatus) -> None:
        wrote.set()
        await hanging.wait()

    stage.cluster.write_status = write_status
    serving = asyncio.create_task(stage.service.run())
    stage.world.job = a_job(4)
    stage.cluster.tell()
    await asyncio.wait_for(wrote.wait(), 20)
    stage.world.kill(1)

    stage.cluster.tell()
    await until(lambda: (1, 0) not in stage.channel.wants[-1].pods)

    assert not hanging.is_set()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


async def test_progress_is_written_at_most_twice_a_second() -> None:
    stage = Stage()
    await stage.settle()
    before = len(stage.world.statuses)

    for step in range(2, 102):
        stage.world.now += 0.02
        stage.channel.say(a_step(step))
        reconciliation = await stage.service.decide()
        if stage.service.is_due(reconciliation):
            await stage.service.act(reconciliation)

    assert 3 <= len(stage.world.statuses) - before <= 4
    assert len(stage.world.records) == 101


async def test_an_incident_is_written_at_once() -> None:
    stage = Stage()
    await stage.settle()
    now = stage.world.now
    stage.channel.facts((GenerationEnded(now, 1, "Hang", 1, now),))

    reconciliation = await stage.service.decide()
    await stage.service.act(reconciliation)

    assert stage.world.status.incidents[0].cause == "Hang"
    assert stage.reasons[-1] == "Hang"


async def test_events_report_phases_after_they_are_written() -> None:
    stage = Stage()

    await stage.settle()

    assert stage.reasons[-1] == "Training"
    assert stage.world.status.phase == "Training"


async def test_facts_told_before_the_first_look_are_kept() -> None:
    stage = Stage(World(a_job(1)))
    generation = a_generation(1, (0, 0))
    stage.channel.facts((GenerationAnnounced(stage.world.now, generation),))
    stage.world.number = 1
    stage.channel.say(a_restore(0))
    stage.channel.say(a_step(1))

    await stage.service.decide()

    assert [record.step for record in stage.world.records] == [1]


async def test_the_coordinator_is_told_only_what_changed() -> None:
    stage = Stage()
    await stage.settle()
    before = len(stage.channel.wants)

    for _ in range(3):
        await stage.service.decide()

    assert len(stage.channel.wants) == before


async def test_errors_of_the_cluster_are_tried_again_and_nothing_is_lost() -> None:
    stage = Stage()
    stage.cluster.errors = [OSError("the API server does not answer") for _ in range(4)]
    serving = asyncio.create_task(stage.service.run())

    await until(lambda: len(stage.world.alive()) == 3 and stage.world.status.workers != ())

    assert not serving.done()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


async def test_an_action_that_fails_does_not_keep_the_status_from_being_written() -> None:
    stage = Stage()
    create = stage.cluster.create_pod

    async def refuse(slot: int, attempt: int, placement: Placement) -> None:
        if slot == 1:
            raise OSError("quota is used up")
        await create(slot, attempt, placement)

    stage.cluster.create_pod = refuse
    done = await stage.service.act(await stage.service.decide())
    await stage.service.act(await stage.service.decide())

    assert not done
    assert stage.world.alive() == {(0, 0), (2, 0)}
    assert stage.world.status.phase == "Pending"
    assert [event.message for event in stage.world.events if event.reason == "ClusterError"] == ["quota is used up"]


async def test_a_pod_that_the_cluster_does_not_show_yet_is_not_taken_for_a_failed_one() -> None:
    stage = Stage(World(a_job(1)))
    snapshot = stage.cluster.snapshot

    reconciliation = await stage.service.decide()

    async def slow() -> Any:
        before = await snapshot()
        await stage.service.act(reconciliation)
        return before

    stage.cluster.snapshot = slow
    await stage.service.decide()
    stage.cluster.snapshot = snapshot
    await stage.settle()

    assert stage.world.created == [(0, 0)]
    assert stage.world.status.bookkeeping.slots[0].failures == 0


async def test_a_bug_is_not_swallowed() -> None:
    stage = Stage()

    async def broken(slot: int, attempt: int, placement: Placement) -> None:
        raise ZeroDivisionError

    stage.cluster.create_pod = broken

    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(stage.service.run(), 20)


async def test_workers_that_die_before_they_join_end_the_job_within_its_budget() -> None:
    world = World(a_job(1, recovery={"budget": {"restarts": 2}}))
    stage = Stage(world)
    for _ in range(100):
        reconciliation = await stage.service.decide()
        await stage.service.act(reconciliation)
        for identity, pod in world.pods.items():
            world.pods[identity] = replace(pod, phase="Failed", message="no such image")
        world.now += reconciliation.decision.requeue_after or 0.0
        if world.status.phase == "Failed":
            break

    assert world.status.reason == "BudgetExhausted"
    assert "no such image" in world.status.message
    assert len(world.created) == 3


async def test_the_status_shows_workers_with_their_ranks_processes() -> None:
    world = World(a_job(2))
    stage = Stage(world)
    await stage.settle()
    world.pods[5, 0] = a_pod(5, 0, "Failed")
    world.pods[6, 0] = a_pod(6, 0, "Succeeded")
    view = stage.channel.view
    stage.channel.view = lambda: replace(view(), pids={0: 100, 1: 101})

    reconciliation = await stage.service.decide()

    workers = {worker.slot: worker for worker in reconciliation.status.workers}
    assert (workers[0].state, workers[0].pids) == ("Training", {0: 100})
    assert (workers[1].state, workers[1].pids) == ("Training", {1: 101})
    assert (workers[5].state, workers[6].state) == ("Lost", "Ended")
    assert reconciliation.status.replicas == 2
    assert reconciliation.status.total_steps == 100


async def test_conditions_keep_the_time_of_their_last_transition() -> None:
    stage = Stage()
    await stage.settle()
    before = {item.type: item.last_transition_time for item in stage.world.status.conditions}

    stage.world.now += 60
    stage.world.kill(1)
    reconciliation = await stage.service.decide()
    stage.channel.go_on()
    reconciliation = await stage.service.decide()

    after = {item.type: item for item in reconciliation.status.conditions}
    assert after["Degraded"].status == "True"
    assert after["Degraded"].last_transition_time > before["Degraded"]
    await stage.settle()
    final = {item.type: item for item in stage.world.status.conditions}
    assert final["Degraded"].status == "False"
