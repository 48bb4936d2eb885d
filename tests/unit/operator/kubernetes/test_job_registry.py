"""Jobs served by the operator: events of the informers, with a job's uid as its identity."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from pretrain_operator.kubernetes.adapter import job_registry
from pretrain_operator.kubernetes.adapter.job_controller import Deps, JobController
from pretrain_operator.kubernetes.adapter.job_registry import JobRegistry, index_of_pod
from pretrain_operator.kubernetes.client.api import Object

OWNER = {"apiVersion": "pretrain.dev/v1alpha1", "kind": "PretrainJob", "name": "gpt2", "controller": True}


def a_job(uid: str, name: str = "gpt2", version: int = 1) -> Object:
    return {"metadata": {"uid": uid, "name": name, "namespace": "team", "resourceVersion": str(version)}}


def a_pod(job: str, node: str = "n1") -> Object:
    labels = {"pretrain.dev/job-uid": job, "pretrain.dev/slot": "0", "pretrain.dev/attempt": "0"}
    owners = [{**OWNER, "uid": job}]
    return {
        "metadata": {"name": f"{job}-0", "namespace": "team", "labels": labels, "ownerReferences": owners},
        "spec": {"nodeName": node},
    }


def a_node(name: str, ready: str) -> Object:
    return {"metadata": {"name": name}, "status": {"conditions": [{"type": "Ready", "status": ready}]}}


class FakeService:
    def __init__(self, body: Object, log: list[str]) -> None:
        metadata = body["metadata"]
        self.uid, self.namespace, self.name = metadata["uid"], metadata["namespace"], metadata["name"]
        self.at_rest = False
        self.woken_at: float | None = None
        self._log = log
        log.append(f"start {self.uid}")

    def changed(self, body: Object) -> None:
        self._log.append(f"changed {self.uid} {body['metadata']['resourceVersion']}")

    def enqueue(self) -> None:
        self._log.append(f"enqueue {self.uid}")

    async def close(self) -> None:
        self._log.append(f"close {self.uid}")


class World:
    """A registry whose informers are played by the test."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pods: list[Object] = []
        deps = SimpleNamespace(
            pods=SimpleNamespace(indexed=lambda value: [pod for pod in self.pods if value in index_of_pod(pod)]),
            server=SimpleNamespace(forget=lambda uid: self.log.append(f"forget {uid}")),
            metrics=SimpleNamespace(
                forget=lambda namespace, name: self.log.append(f"no metrics of {namespace}/{name}")
            ),
            clock=lambda: 100.0,
            random=lambda: 0.0,
        )
        self.services: list[FakeService] = []
        self.jobs = JobRegistry(cast(Deps, deps), self._serve)

    def _serve(self, body: Object, _: Deps) -> JobController:
        self.services.append(FakeService(body, self.log))
        return cast(JobController, self.services[-1])

    def added(self, *bodies: Object) -> None:
        for body in bodies:
            self.jobs.job_event("ADDED", body)


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(job_registry, "RESYNC_SECONDS", 0.0)
    return World()


async def test_a_job_made_again_under_its_name_is_another_one(world: World) -> None:
    world.added(a_job("old"))
    world.jobs.job_event("DELETED", a_job("old"))
    world.added(a_job("new", version=9))
    await asyncio.sleep(0)

    assert world.log == ["start old", "forget old", "no metrics of team/gpt2", "start new", "close old"]
    assert world.jobs.namespace_of("old") is None
    assert world.jobs.namespace_of("new") == "team"


async def test_metrics_stay_while_another_job_has_the_name(world: World) -> None:
    world.added(a_job("old"), a_job("new", version=9))
    world.jobs.job_event("DELETED", a_job("old"))
    await asyncio.sleep(0)

    assert world.log == ["start old", "start new", "forget old", "close old"]


async def test_a_change_reaches_the_controller_of_its_job(world: World) -> None:
    world.added(a_job("one"), a_job("two", "two"))

    world.jobs.job_event("MODIFIED", a_job("two", "two", version=2))

    assert world.log == ["start one", "start two", "changed two 2"]


async def test_a_bug_with_one_job_does_not_end_the_watch_of_the_others(world: World) -> None:
    world.added(a_job("one"), a_job("two", "two"))

    def broken(body: Object) -> None:
        raise ArithmeticError(body)

    world.services[0].changed = broken  # type: ignore[method-assign]
    world.jobs.job_event("MODIFIED", a_job("one", version=2))
    world.jobs.job_event("MODIFIED", a_job("two", "two", version=2))

    assert world.log[-1] == "changed two 2"


async def test_the_deletion_of_an_unknown_job_does_nothing(world: World) -> None:
    world.jobs.job_event("DELETED", a_job("unknown"))

    assert world.log == []


async def test_a_resync_enqueues_every_job_that_has_not_ended(world: World) -> None:
    world.added(a_job("one"), a_job("ended", "ended"))
    world.services[1].at_rest = True
    world.log.clear()
    resync = asyncio.create_task(world.jobs.resync())

    while len(world.log) < 2:
        await asyncio.sleep(0)
    resync.cancel()

    assert set(world.log) == {"enqueue one"}


async def test_pods_wake_the_job_that_they_belong_to(world: World) -> None:
    world.added(a_job("one"), a_job("two", "two"))
    world.log.clear()

    world.jobs.pod_event("MODIFIED", a_pod("two"))
    world.jobs.pod_event("MODIFIED", a_pod("unknown"))

    assert world.log == ["enqueue two"]


async def test_a_node_wakes_the_jobs_on_it_when_its_readiness_changes(world: World) -> None:
    world.added(a_job("one"), a_job("two", "two"))
    world.pods = [a_pod("one", "n1"), a_pod("two", "n2")]
    world.jobs.node_event("ADDED", a_node("n1", "True"))
    world.log.clear()

    world.jobs.node_event("MODIFIED", a_node("n1", "True"))
    assert world.log == []
    world.jobs.node_event("MODIFIED", a_node("n1", "Unknown"))
    world.jobs.node_event("DELETED", a_node("n1", "Unknown"))

    assert world.log == ["enqueue one", "enqueue one"]
