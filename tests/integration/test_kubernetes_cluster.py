"""One job's cluster against a real API server: what it creates, adopts, refuses, writes, and what it leaves alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from pretrain_api.status.job import Bookkeeping, JobStatus, SlotMemory
from pretrain_operator.cluster import Event, Placement, Pod, PodRefused
from pretrain_operator.kubernetes.adapter.cluster import KubernetesCluster
from pretrain_operator.kubernetes.adapter.expectations import OVERDUE_SECONDS
from pretrain_operator.kubernetes.client.api import (
    CONFIG_MAPS,
    EVENTS,
    JOBS,
    NETWORK_POLICIES,
    PODS,
    Api,
    ApiError,
    Object,
    Resource,
)
from pretrain_operator.kubernetes.client.informer import Informer
from pretrain_operator.kubernetes.client.refusals import Gone
from pretrain_operator.kubernetes.workload.names import WORKER_SELECTOR, index_by_job
from pretrain_operator.kubernetes.workload.validation import InvalidSpec
from support.kubernetes.jobs import NOON, SETTINGS, a_job_body

NAMESPACES = Resource("", "v1", "namespaces")
QUOTAS = Resource("", "v1", "resourcequotas")


@dataclass
class World:
    """One job in a namespace of its own, and calls counted."""

    api: Api
    namespace: str
    body: Object
    calls: list[tuple[str, str]]
    now: float = NOON
    woken: int = 0
    informers: list[Informer] = field(default_factory=list)

    def cluster(self, pods: Informer | None = None) -> KubernetesCluster:
        """An operator that has just heard of the job."""
        made = KubernetesCluster(self.api, self.body, pods or self.unheard(), None, SETTINGS, lambda: self.now)
        made.subscribe(self._wake)
        return made

    def unheard(self) -> Informer:
        """An informer that is behind: it has heard of no pod."""
        return Informer(self.api, PODS, self.namespace, label_selector=WORKER_SELECTOR, index=index_by_job)

    async def get(self, resource: Resource, name: str) -> Object:
        return await self.api.get(resource, self.namespace, name)

    async def names(self, resource: Resource) -> list[str]:
        items, _ = await self.api.list(resource, self.namespace)
        return sorted(item["metadata"]["name"] for item in items if item["metadata"]["name"] != "kube-root-ca.crt")

    def name(self, suffix: str = "") -> str:
        return f"gpt2-{self.body['metadata']['uid'][:5]}{suffix}"

    def _wake(self) -> None:
        self.woken += 1


@pytest.fixture
async def world(apiserver: Any, namespace: str) -> AsyncIterator[World]:
    calls: list[tuple[str, str]] = []
    client = await Api.connect(kubeconfig=apiserver, on_call=lambda verb, code: calls.append((verb, code)))
    body = await client.create(JOBS, namespace, a_job_body())
    calls.clear()
    yield World(client, namespace, body, calls)
    await client.close()


@contextlib.asynccontextmanager
async def listening(world: World, *subscribers: Callable[[str, Object], None]) -> AsyncIterator[Informer]:
    """An informer that keeps up."""
    informer = world.unheard()
    for subscriber in subscribers:
        informer.subscribe(subscriber)
    running = asyncio.create_task(informer.run())
    await informer.synced()
    yield informer
    running.cancel()
    await asyncio.wait((running,))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def identities(pods: tuple[Pod, ...]) -> list[tuple[int, int]]:
    return [(pod.slot, pod.attempt) for pod in pods]


async def test_a_worker_is_created_with_all_that_it_needs(world: World) -> None:
    cluster = world.cluster()

    await cluster.create_pod(2, 0, Placement())

    pod = await world.get(PODS, world.name("-2-0"))
    assert pod["metadata"]["labels"] == {
        "pretrain.dev/job": "gpt2",
        "pretrain.dev/job-uid": world.body["metadata"]["uid"],
        "pretrain.dev/slot": "2",
        "pretrain.dev/attempt": "0",
    }
    config = await world.get(CONFIG_MAPS, world.name())
    policy = await world.get(NETWORK_POLICIES, world.name())
    owned = [item["metadata"]["ownerReferences"][0]["uid"] for item in (pod, config, policy)]
    assert owned == [world.body["metadata"]["uid"]] * 3
    assert config["immutable"] is True


async def test_a_placement_and_a_template_full_of_wishes_make_a_pod_that_kubernetes_takes(world: World) -> None:
    zone = {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["x", "y"]}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [zone]}}
    worker = {
        "resources": {"limits": {"nvidia.com/gpu": 2, "memory": "1Gi"}},
        "env": [{"name": "OMP_NUM_THREADS", "value": "2"}],
        "ports": [{"name": "debug", "containerPort": 5678}],
    }
    side = {"name": "side", "image": "side:1"}
    template = {"spec": {"affinity": {"nodeAffinity": required}, "containers": [side, worker]}}
    patch = {"spec": {"workers": {"template": template}}}
    world.body = await world.api.merge_patch(JOBS, world.namespace, "gpt2", patch)
    placement = Placement(never=frozenset({"a", "b"}), rather_not=frozenset({"c"}), grace_seconds=90.5)

    await world.cluster().create_pod(0, 0, placement)

    kept = (await world.get(PODS, world.name("-0-0")))["spec"]
    assert [container["name"] for container in kept["containers"]] == ["worker", "side"]
    assert kept["terminationGracePeriodSeconds"] == 96


async def test_a_created_pod_is_in_the_next_snapshot_though_the_informer_is_behind(world: World) -> None:
    cluster = world.cluster()

    await cluster.create_pod(0, 3, Placement())

    assert identities((await cluster.snapshot()).pods) == [(0, 3)]


async def test_what_pods_need_is_made_once_for_all_of_them(world: World) -> None:
    cluster = world.cluster()

    for slot in range(3):
        await cluster.create_pod(slot, 0, Placement())

    assert [call for call in world.calls if call[0] == "create"] == [("create", "201")] * 5
    assert await world.names(PODS) == [world.name(f"-{slot}-0") for slot in range(3)]


async def test_an_operator_that_did_not_hear_the_answer_adopts_its_pod(world: World) -> None:
    await world.cluster().create_pod(0, 0, Placement())
    after_a_crash = world.cluster()

    await after_a_crash.create_pod(0, 0, Placement())

    assert identities((await after_a_crash.snapshot()).pods) == [(0, 0)]
    assert await world.names(PODS) == [world.name("-0-0")]


@pytest.mark.parametrize("difference", ["owner", "slot", "attempt"])
async def test_a_foreign_pod_of_the_same_name_is_not_taken_for_a_worker(world: World, difference: str) -> None:
    await world.cluster().create_pod(0, 0, Placement())
    pod = await world.get(PODS, world.name("-0-0"))
    await world.api.delete(PODS, world.namespace, pod["metadata"]["name"], uid=pod["metadata"]["uid"], grace_seconds=0)
    pod["metadata"] = {key: pod["metadata"][key] for key in ("name", "labels", "ownerReferences")}
    if difference == "owner":
        pod["metadata"]["ownerReferences"][0]["uid"] = "another"
    else:
        pod["metadata"]["labels"][f"pretrain.dev/{difference}"] = "7"
    await world.api.create(PODS, world.namespace, pod)
    cluster = world.cluster()

    with pytest.raises(OSError, match=r"gpt2-.*-0-0 has the name that this job needs and belongs to another owner"):
        await cluster.create_pod(0, 0, Placement())

    assert (await cluster.snapshot()).pods == ()


async def test_a_pod_that_is_being_deleted_is_not_adopted(world: World) -> None:
    await world.cluster().create_pod(0, 0, Placement())
    patch = {"metadata": {"finalizers": ["test.pretrain.dev/stay"]}}
    pod = await world.api.merge_patch(PODS, world.namespace, world.name("-0-0"), patch)
    await world.api.delete(PODS, world.namespace, world.name("-0-0"), uid=pod["metadata"]["uid"], grace_seconds=0)

    with pytest.raises(OSError, match="is still being deleted"):
        await world.cluster().create_pod(0, 0, Placement())


async def test_a_foreign_config_map_of_the_same_name_is_not_used(world: World) -> None:
    await world.api.create(CONFIG_MAPS, world.namespace, {"metadata": {"name": world.name()}, "data": {}})

    with pytest.raises(OSError, match=r"configmap gpt2-.* belongs to another owner"):
        await world.cluster().create_pod(0, 0, Placement())

    assert await world.names(PODS) == []


async def test_the_informer_takes_over_from_what_was_expected(world: World) -> None:
    async with listening(world) as informer:
        cluster = world.cluster(informer)
        await cluster.create_pod(0, 0, Placement())
        await until(lambda: informer.get(world.namespace, world.name("-0-0")) is not None)
        assert identities((await cluster.snapshot()).pods) == [(0, 0)]
        pod = await world.get(PODS, world.name("-0-0"))
        await world.api.delete(PODS, world.namespace, world.name("-0-0"), uid=pod["metadata"]["uid"], grace_seconds=0)
        await until(lambda: informer.get(world.namespace, world.name("-0-0")) is None)

        assert (await cluster.snapshot()).pods == ()


async def test_a_pod_that_the_informer_never_shows_is_asked_for(world: World) -> None:
    cluster = world.cluster()
    await cluster.create_pod(0, 0, Placement())
    await cluster.create_pod(1, 0, Placement())
    pod = await world.get(PODS, world.name("-0-0"))
    await world.api.delete(PODS, world.namespace, world.name("-0-0"), uid=pod["metadata"]["uid"], grace_seconds=0)
    world.calls.clear()

    world.now += OVERDUE_SECONDS - 0.1
    assert identities((await cluster.snapshot()).pods) == [(0, 0), (1, 0)]
    assert world.calls == []
    world.now += 0.1

    assert identities((await cluster.snapshot()).pods) == [(1, 0)]
    assert sorted(world.calls) == [("get", "200"), ("get", "404")]


async def test_a_deleted_pod_counts_as_deleting_before_the_informer_says_so(world: World) -> None:
    cluster = world.cluster()
    await cluster.create_pod(0, 0, Placement())
    [pod] = (await cluster.snapshot()).pods

    await cluster.delete_pod(pod, 30.0)

    assert [seen.deleting for seen in (await cluster.snapshot()).pods] == [True]
    await cluster.delete_pod(pod, 0.0)
    assert await world.names(PODS) == []


async def test_deleting_spares_another_pod_of_the_same_name(world: World) -> None:
    cluster = world.cluster()
    await cluster.create_pod(0, 0, Placement())
    [pod] = (await cluster.snapshot()).pods
    first = await world.get(PODS, world.name("-0-0"))
    await world.api.delete(PODS, world.namespace, world.name("-0-0"), uid=first["metadata"]["uid"], grace_seconds=0)
    await world.cluster().create_pod(0, 0, Placement())

    await cluster.delete_pod(pod, 0.0)

    assert await world.names(PODS) == [world.name("-0-0")]


async def test_deleting_a_pod_that_is_gone_is_success(world: World) -> None:
    await world.cluster().delete_pod(Pod(0, 0, "Running"), 0.0)

    assert world.calls == []


async def test_a_quota_is_told_with_its_remedy(world: World) -> None:
    quota = {"metadata": {"name": "few"}, "spec": {"hard": {"pods": "1"}}}
    kept = await world.api.create(QUOTAS, world.namespace, quota)
    counted = kept | {"status": {"hard": {"pods": "1"}, "used": {"pods": "0"}}}  # no controller does that here
    await world.api.replace(QUOTAS, world.namespace, "few", counted, subresource="status")
    cluster = world.cluster()
    await cluster.create_pod(0, 0, Placement())

    with pytest.raises(
        PodRefused, match=r"worker 1 cannot be created: .*exceeded quota: few.* raise or free the quota"
    ) as refused:
        await cluster.create_pod(1, 0, Placement())

    assert refused.value.reason == "QuotaExceeded"
    assert identities((await cluster.snapshot()).pods) == [(0, 0)]


@pytest.fixture
async def restricted(world: World) -> World:
    """The namespace takes pods of the restricted standard only."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    await world.api.merge_patch(NAMESPACES, None, world.namespace, {"metadata": {"labels": labels}})
    return world


async def test_a_restricted_namespace_takes_our_pods(restricted: World) -> None:
    await restricted.cluster().create_pod(0, 0, Placement())

    assert await restricted.names(PODS) == [restricted.name("-0-0")]


async def test_a_restricted_namespace_refuses_what_the_template_loosens(restricted: World) -> None:
    patch = {"spec": {"workers": {"template": {"spec": {"hostNetwork": True}}}}}
    restricted.body = await restricted.api.merge_patch(JOBS, restricted.namespace, "gpt2", patch)

    with pytest.raises(PodRefused, match=r"violates PodSecurity .*host namespaces") as refused:
        await restricted.cluster().create_pod(0, 0, Placement())

    assert refused.value.reason == "Forbidden"


async def test_a_template_that_kubernetes_does_not_take_is_told(world: World) -> None:
    template = {"spec": {"tolerations": [{"key": "gpu", "operator": "Likes"}]}}
    patch = {"spec": {"workers": {"template": template}}}
    world.body = await world.api.merge_patch(JOBS, world.namespace, "gpt2", patch)

    with pytest.raises(PodRefused, match=r'worker 0 cannot be created: .*"Likes".*; fix spec\.workers') as refused:
        await world.cluster().create_pod(0, 0, Placement())

    assert refused.value.reason == "Invalid"


async def test_a_written_status_is_what_the_next_operator_finds(world: World) -> None:
    books = Bookkeeping(slots=(SlotMemory(slot=0, attempt=4, joined=True),))
    status = JobStatus(phase="Training", step=7, loss=float("nan"), replicas=3, bookkeeping=books)

    await world.cluster().write_status(status)

    world.body = await world.get(JOBS, "gpt2")
    found = (await world.cluster().snapshot()).status
    assert found == status.model_copy(update={"loss": None})


async def test_a_status_is_written_though_the_object_was_changed_meanwhile(world: World) -> None:
    cluster = world.cluster()
    await world.api.merge_patch(JOBS, world.namespace, "gpt2", {"spec": {"workers": {"replicas": 5}}})

    await cluster.write_status(JobStatus(phase="Starting"))

    snapshot = await cluster.snapshot()
    kept = await world.get(JOBS, "gpt2")
    assert (kept["status"]["phase"], kept["spec"]["workers"]["replicas"]) == ("Starting", 5)
    assert (snapshot.job.spec.workers.replicas, snapshot.status.phase) == (5, "Starting")
    assert world.woken == 1
    assert world.calls.count(("update", "409")) == 1


async def test_a_status_takes_one_call(world: World) -> None:
    cluster = world.cluster()

    for step in range(3):
        await cluster.write_status(JobStatus(phase="Training", step=step))

    assert world.calls == [("update", "200")] * 3


async def test_what_this_process_wrote_is_no_news(world: World) -> None:
    cluster = world.cluster()
    await cluster.write_status(JobStatus(phase="Training", step=1))
    written = await world.get(JOBS, "gpt2")
    await cluster.write_status(JobStatus(phase="Training", step=2))

    cluster.job_changed(await world.get(JOBS, "gpt2"))
    cluster.job_changed(written)

    assert world.woken == 0
    assert (await cluster.snapshot()).status.step == 2
    world.calls.clear()
    await cluster.write_status(JobStatus(phase="Training", step=3))
    assert world.calls == [("update", "200")]


async def test_a_job_that_was_deleted_is_gone(world: World) -> None:
    cluster = world.cluster()

    await cluster.delete_job()

    with pytest.raises(Gone):
        await cluster.write_status(JobStatus(phase="Training"))
    await cluster.delete_job()


async def test_another_job_of_the_same_name_is_left_alone(world: World) -> None:
    cluster = world.cluster()
    await cluster.delete_job()
    second = await world.api.create(JOBS, world.namespace, a_job_body())

    with pytest.raises(Gone):
        await cluster.write_status(JobStatus(phase="Failed"))
    await cluster.delete_job()

    kept = await world.get(JOBS, "gpt2")
    assert kept["metadata"]["uid"] == second["metadata"]["uid"]
    assert "status" not in kept


async def test_a_deletion_that_something_holds_up_is_a_stop(world: World) -> None:
    patch = {"metadata": {"finalizers": ["test.pretrain.dev/stay"]}}
    world.body = await world.api.merge_patch(JOBS, world.namespace, "gpt2", patch)
    cluster = world.cluster()
    assert not (await cluster.snapshot()).stopping
    await cluster.delete_job()

    cluster.job_changed(await world.get(JOBS, "gpt2"))

    assert (await cluster.snapshot()).stopping
    assert world.woken == 1


async def test_a_spec_that_became_invalid_leaves_the_last_good_one_in_force(world: World) -> None:
    cluster = world.cluster()
    bad = {"spec": {"workers": {"replicas": 4, "template": {"spec": {"restartPolicy": "Always"}}}}}
    cluster.job_changed(await world.api.merge_patch(JOBS, world.namespace, "gpt2", bad))

    snapshot = await cluster.snapshot()
    assert snapshot.job.spec.workers.replicas == 3
    assert "restartPolicy must be Never" in snapshot.invalid

    mended = {"spec": {"workers": {"template": {"spec": {"restartPolicy": "Never"}}}}}
    cluster.job_changed(await world.api.merge_patch(JOBS, world.namespace, "gpt2", mended))
    snapshot = await cluster.snapshot()
    assert (snapshot.job.spec.workers.replicas, snapshot.invalid) == (4, "")


async def test_a_job_that_never_was_valid_is_refused_at_once(world: World) -> None:
    patch = {"spec": {"workers": {"template": {"spec": {"nodeName": "n"}}}}}
    world.body = await world.api.merge_patch(JOBS, world.namespace, "gpt2", patch)

    with pytest.raises(InvalidSpec, match="nodeName"):
        world.cluster()


async def test_an_event_that_comes_again_is_counted(world: World) -> None:
    cluster = world.cluster()
    event = Event("Warning", "WorkerLost", "worker 1 was lost")

    for _ in range(3):
        await cluster.emit(event)
        world.now += 60
    await cluster.emit(Event("Normal", "Training", "3 of 3 workers train"))

    events, _ = await world.api.list(EVENTS, world.namespace)
    counted = {event["reason"]: (event["count"], event["message"]) for event in events}
    assert counted == {"WorkerLost": (3, "worker 1 was lost"), "Training": (1, "3 of 3 workers train")}
    assert {event["involvedObject"]["uid"] for event in events} == {world.body["metadata"]["uid"]}


async def test_an_event_that_comes_again_much_later_is_another(world: World) -> None:
    cluster = world.cluster()

    await cluster.emit(Event("Normal", "Training", "again"))
    world.now += 600
    await cluster.emit(Event("Normal", "Training", "again"))

    events, _ = await world.api.list(EVENTS, world.namespace)
    assert [event["count"] for event in events] == [1, 1]


async def test_an_event_that_the_server_does_not_take_stops_nothing(world: World) -> None:
    cluster = world.cluster()
    terminating = await world.api.get(NAMESPACES, None, world.namespace)
    await world.api.delete(NAMESPACES, None, world.namespace, uid=terminating["metadata"]["uid"])
    world.calls.clear()

    await cluster.emit(Event("Normal", "Training", "too late"))

    assert world.calls == [("create", "403")]


async def test_looking_costs_no_call(world: World) -> None:
    async with listening(world) as informer:
        cluster = world.cluster(informer)
        world.calls.clear()

        for _ in range(50):
            world.now += 60
            await cluster.snapshot()

        assert [call for call in world.calls if call[0] != "watch"] == []


@pytest.mark.parametrize(
    ("field", "patch"),
    [
        ("training", {"training": {"seed": 2}}),
        ("checkpoint", {"checkpoint": {"storage": {"s3": {"bucket": "elsewhere"}}}}),
        ("checkpoint", {"checkpoint": {"interval": {"steps": 10}}}),
        ("recovery.divergence", {"recovery": {"divergence": {"skipSteps": 5}}}),
    ],
)
async def test_what_workers_were_started_with_cannot_be_changed(world: World, field: str, patch: Object) -> None:
    with pytest.raises(ApiError, match=f"{field} is immutable: delete the job and create it again"):
        await world.api.merge_patch(JOBS, world.namespace, "gpt2", {"spec": patch})


async def test_all_else_can_be_changed(world: World) -> None:
    patch = {
        "suspend": True,
        "workers": {"replicas": 5, "image": "another:1", "spares": 1, "template": {"metadata": {"labels": {"a": "b"}}}},
        "recovery": {"budget": {"restarts": 5}, "hang": {"timeout": "5m"}},
        "ttlAfterFinished": "1h",
    }

    await world.api.merge_patch(JOBS, world.namespace, "gpt2", {"spec": patch})

    await world.api.merge_patch(JOBS, world.namespace, "gpt2", {"spec": {"training": {"steps": 100}}})
