"""Which jobs are served: what the watch and the lists say, in whatever order, with a job's uid as its identity."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pretrain_operator.kubernetes.adapter import job_registry as module
from pretrain_operator.kubernetes.adapter.job_controller import Desk
from pretrain_operator.kubernetes.adapter.job_registry import Jobs, index_of_pod
from pretrain_operator.kubernetes.client.api import ApiError, Object

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

    def poke(self) -> None:
        self._log.append(f"poke {self.uid}")

    async def close(self) -> None:
        self._log.append(f"close {self.uid}")


class World:
    """An API server whose lists come when told, and pods by what the registry asks for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.lists: asyncio.Queue[list[Object] | ApiError] = asyncio.Queue()
        self.asked = asyncio.Semaphore(0)
        self.pods: list[Object] = []
        desk = SimpleNamespace(
            api=SimpleNamespace(list=self._list),
            pods=SimpleNamespace(indexed=lambda value: [pod for pod in self.pods if value in index_of_pod(pod)]),
            server=SimpleNamespace(forget=lambda uid: self.log.append(f"forget {uid}")),
            metrics=SimpleNamespace(
                forget=lambda namespace, name: self.log.append(f"no metrics of {namespace}/{name}")
            ),
            clock=lambda: 100.0,
        )
        self.jobs = Jobs(cast(Desk, desk), "team", lambda: 0.0, lambda body, _: cast(Any, FakeService(body, self.log)))

    async def _list(self, resource: object, namespace: str) -> tuple[list[Object], str]:
        self.asked.release()
        found = await self.lists.get()
        if isinstance(found, ApiError):
            raise found
        return found, "1"

    async def listed(self, *bodies: Object) -> None:
        """Answer a list that was asked for."""
        await asyncio.wait_for(self.asked.acquire(), 5)
        self.lists.put_nowait(list(bodies))
        await asyncio.wait_for(self.asked.acquire(), 5)  # the next one
        self.asked.release()

    def said(self) -> list[str]:
        said, self.log = list(self.log), self.log
        self.log.clear()
        return [line for line in said if not line.startswith("poke")]


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(module, "RESYNC_SECONDS", 0.0)
    world = World()
    running = asyncio.create_task(world.jobs.run())
    yield world
    running.cancel()
    await asyncio.wait((running,))


async def test_every_job_of_the_first_list_is_served_and_none_before(world: World) -> None:
    world.jobs.job_event("ADDED", a_job("early"))
    assert world.said() == []

    await world.listed(a_job("early"), a_job("other", "other"))

    assert world.said() == ["start early", "start other"]


async def test_a_job_made_again_under_its_name_is_another_one(world: World) -> None:
    await world.listed(a_job("old"))
    world.jobs.job_event("ADDED", a_job("new", version=9))
    world.jobs.job_event("DELETED", a_job("old"))
    await asyncio.sleep(0)

    assert world.said() == ["start old", "start new", "forget old", "close old"]  # the metrics are the new one's now
    assert world.jobs.namespace_of("old") is None
    assert world.jobs.namespace_of("new") == "team"


async def test_a_deletion_that_the_watch_missed_is_found_by_the_next_list(world: World) -> None:
    await world.listed(a_job("gone"), a_job("stays", "stays"))
    world.said()

    await world.listed(a_job("stays", "stays", version=2))
    await asyncio.sleep(0)

    assert world.said() == ["forget gone", "no metrics of team/gpt2", "changed stays 2", "close gone"]


async def test_a_job_deleted_while_a_list_was_on_its_way_stays_deleted(world: World) -> None:
    await world.listed(a_job("old"))
    world.said()
    world.jobs.job_event("DELETED", a_job("old"))

    await world.listed(a_job("old"))

    assert "start old" not in world.said()


async def test_a_job_made_while_a_list_was_on_its_way_is_not_taken_for_deleted(world: World) -> None:
    await world.listed()
    world.jobs.job_event("ADDED", a_job("new"))

    await world.listed()

    assert world.said() == ["start new"]


async def test_a_list_that_fails_ends_no_job(world: World) -> None:
    await world.listed(a_job("one"))
    await asyncio.wait_for(world.asked.acquire(), 5)
    world.lists.put_nowait(ApiError(500, "InternalError", "it broke"))
    await world.listed(a_job("one"))

    assert world.jobs.namespace_of("one") == "team"
    assert "close one" not in world.said()


async def test_pods_wake_the_job_that_they_belong_to(world: World) -> None:
    await world.listed(a_job("one"), a_job("two", "two"))
    world.log.clear()

    world.jobs.pod_event("MODIFIED", a_pod("two"))
    world.jobs.pod_event("MODIFIED", a_pod("unknown"))

    assert world.log == ["poke two"]


async def test_a_node_wakes_the_jobs_on_it_when_its_readiness_changes(world: World) -> None:
    await world.listed(a_job("one"), a_job("two", "two"))
    world.pods = [a_pod("one", "n1"), a_pod("two", "n2")]
    world.jobs.node_event("ADDED", a_node("n1", "True"))
    world.log.clear()

    world.jobs.node_event("MODIFIED", a_node("n1", "True"))
    assert world.log == []
    world.jobs.node_event("MODIFIED", a_node("n1", "Unknown"))
    world.jobs.node_event("DELETED", a_node("n1", "Unknown"))

    assert world.log == ["poke one", "poke one"]
