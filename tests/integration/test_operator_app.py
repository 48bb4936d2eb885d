"""The whole operator in one process against a real API server: from `create` to the last pod."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from pretrain_api.status.job import JobStatus
from pretrain_operator.decide.conditions import condition_of
from pretrain_operator.job.service import JobService, Reconciliation
from pretrain_operator.kubernetes.adapter import janitor
from pretrain_operator.kubernetes.adapter import job_registry as jobs
from pretrain_operator.kubernetes.client.api import (
    CONFIG_MAPS,
    EVENTS,
    JOBS,
    LEASES,
    NETWORK_POLICIES,
    PODS,
    Api,
    ApiError,
    Object,
)
from pretrain_operator.kubernetes.client.transport import FencedTransport, Transport
from pretrain_operator.kubernetes.leader.active import claim
from pretrain_operator.kubernetes.leader.lease import LeaseLost
from pretrain_operator.kubernetes.server.app import RunningOperator, running_operator
from pretrain_operator.kubernetes.workload.names import UID_LABEL, owner_uid, worker_pod
from support.kubernetes.api_proxy import Answer, ApiProxy, Cut, Matches
from support.kubernetes.api_server import ApiServer
from support.kubernetes.app import Town, a_town, until
from support.kubernetes.tls import Authority
from support.ports import free_port


@pytest.fixture
async def town(api: Api, namespace: str, apiserver: Path, tmp_path: Path) -> AsyncIterator[Town]:
    async with a_town(api, namespace, apiserver, tmp_path) as town:
        yield town


async def test_a_job_trains_to_the_end_and_no_worker_runs_on(town: Town) -> None:
    await town.submit(until=10, total=10)

    async with running_operator(town.options):
        status = await town.reaches("Succeeded")

        async def all_succeeded() -> bool:
            return [pod["status"]["phase"] for pod in await town.pods()] == ["Succeeded"] * 3

        assert await until(all_succeeded)

    assert status.step == 10


async def test_a_deleted_pod_is_replaced_and_training_goes_on_from_the_checkpoint(town: Town) -> None:
    await town.submit()
    async with running_operator(town.options):
        await town.reaches("Training", step=3)
        await town.kubelet.remove((await town.pods())[1]["metadata"]["name"])
        town.kubelet.training["gpt2"].until = 5

        status = await town.reaches("Training", step=5)

        assert await until(lambda: len(town.kubelet.agents) == 3)
        attempts = [pod["metadata"]["labels"]["pretrain.dev/attempt"] for pod in await town.pods()]
        assert sorted(attempts) == ["0", "0", "1"]
        assert status.incidents[-1].steps_lost in (0, None)


async def test_a_suspended_job_goes_on_when_it_is_resumed_by_the_same_operator(town: Town) -> None:
    await town.submit()
    async with running_operator(town.options):
        await town.reaches("Training", step=3)

        await town.change({"suspend": True})
        await town.reaches("Suspended")
        await until(lambda: town_is_empty(town))
        await town.change({"suspend": False})
        town.kubelet.training["gpt2"].until = 5
        await town.reaches("Training", step=5)

        await town.change({"suspend": True})
        await town.reaches("Suspended")


async def town_is_empty(town: Town) -> bool:
    return not await town.pods()


async def test_an_operator_that_ends_disturbs_no_training_and_the_next_one_adopts_it(town: Town) -> None:
    await town.submit()
    async with running_operator(town.options):
        before = await town.reaches("Training", step=3)
    town.kubelet.training["gpt2"].until = 6
    await until(lambda: town.kubelet.training["gpt2"].step == 6)

    async with running_operator(town.options):
        after = await town.reaches("Training", step=6)

    assert after.generation == before.generation
    assert not after.incidents


async def get(url: str) -> tuple[int, str]:
    """Status and text; 0 while nobody listens."""
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status, await response.text()
    except aiohttp.ClientError:
        return 0, ""


async def test_a_standby_is_ready_and_takes_over_when_the_active_replica_ends(town: Town) -> None:
    await town.submit()
    standby = town.options.model_copy(update={"metrics_port": free_port(), "probe_port": free_port()})
    async with contextlib.AsyncExitStack() as first, running_operator(standby) as second:
        one = await first.enter_async_context(running_operator(town.options))
        operators = (one.operator, second.operator)
        await until(lambda: any(operator.active.is_set() for operator in operators))
        await town.reaches("Training", step=3)
        for options in (town.options, standby):
            assert await until(lambda port=options.metrics_port: answers(port, "readyz"))
            assert await until(lambda port=options.probe_port: answers(port, "healthz"))
        if one.operator.active.is_set():
            await first.aclose()
            await asyncio.wait_for(second.operator.active.wait(), 5)
        town.kubelet.training["gpt2"].until = 6
        status = await town.reaches("Training", step=6)

    assert status.generation == 1
    assert not status.incidents


async def answers(port: int, path: str) -> bool:
    return (await get(f"http://127.0.0.1:{port}/{path}"))[0] == 200


async def test_the_metrics_tell_of_the_job_until_it_is_deleted(town: Town) -> None:
    await town.submit()
    url = f"http://127.0.0.1:{town.options.metrics_port}/metrics"

    async def told() -> bool:
        return f'pretrain_job_step{{name="gpt2",namespace="{town.namespace}"}} 3.0' in (await get(url))[1]

    async def forgotten() -> bool:
        return "gpt2" not in (await get(url))[1]

    async with running_operator(town.options):
        await until(told)
        assert "pretrain_operator_leader 1.0" in (await get(url))[1]
        assert "pretrain_operator_agents_connected 3.0" in (await get(url))[1]
        await town.delete_job()
        await until(forgotten)


async def test_two_jobs_do_not_touch_each_other(town: Town) -> None:
    await town.submit("one")
    await town.submit("two")
    async with running_operator(town.options):
        calm = await town.reaches("Training", "one", step=3)
        await town.reaches("Training", "two", step=3)

        await town.kubelet.remove((await town.pods("two"))[0]["metadata"]["name"])
        await until(lambda: had_an_incident(town, "two"))
        await town.delete_job("two")
        town.kubelet.training["one"].until = 6
        after = await town.reaches("Training", "one", step=6)

    assert (after.generation, after.incidents, after.workers) == (calm.generation, (), calm.workers)


async def had_an_incident(town: Town, name: str) -> bool:
    return bool((await town.status(name)).incidents)


async def test_a_job_is_scaled_by_its_scale_subresource(town: Town, server: ApiServer) -> None:
    await town.submit(until=9_999, total=10_000, workers={"replicas": 3, "elastic": {"min": 1, "max": 4}})
    scale = ("-n", town.namespace, "scale", "ptj", "gpt2")
    async with running_operator(town.options):
        await town.reaches("Training", step=3)
        await asyncio.to_thread(server.kubectl, *scale, "--replicas=4")
        await until(lambda: members(town, 4))
        await asyncio.to_thread(server.kubectl, *scale, "--replicas=2")
        await until(lambda: members(town, 2))
        shown = await asyncio.to_thread(server.kubectl, "-n", town.namespace, "get", "--raw", scale_path(town))

    assert json.loads(shown)["status"]["replicas"] == 2


def scale_path(town: Town) -> str:
    return JOBS.path(town.namespace, "gpt2", "scale")


async def members(town: Town, count: int) -> bool:
    """So many workers train, and there are no others."""
    status = await town.status()
    states = [worker.state for worker in status.workers]
    return status.phase == "Training" and status.replicas == count and states.count("Training") == count


async def test_everything_that_is_made_for_a_job_goes_with_it(town: Town) -> None:
    job = await town.submit()
    async with running_operator(town.options):
        await town.reaches("Training", step=3)
    made = [
        child
        for resource in (PODS, CONFIG_MAPS, NETWORK_POLICIES)
        for child in (await town.api.list(resource, town.namespace, label_selector=UID_LABEL))[0]
    ]

    assert len(made) == 5
    assert {owner_uid(child) for child in made} == {job["metadata"]["uid"]}


async def test_pods_of_a_job_that_is_gone_are_removed(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(janitor, "ORPHAN_SECONDS", 0.0)
    monkeypatch.setattr(janitor, "ROUND_SECONDS", 0.1)
    await town.submit()
    async with running_operator(town.options):
        await town.reaches("Training", step=3)
        await town.delete_job()  # there is no garbage collector here

        await until(lambda: town_is_empty(town))


async def test_a_pod_whose_kubelet_does_not_answer_is_removed_by_force(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(janitor, "OVERDUE_SECONDS", 0.0)
    await town.submit()
    async with running_operator(town.options):
        await town.reaches("Training", step=3)
        pod = (await town.pods())[0]
        town.kubelet.answers = False
        await town.api.delete(
            PODS, town.namespace, pod["metadata"]["name"], uid=pod["metadata"]["uid"], grace_seconds=1
        )

        async def gone() -> bool:
            return pod["metadata"]["uid"] not in {other["metadata"]["uid"] for other in await town.pods()}

        await until(gone)


async def test_a_spec_in_error_is_named_in_the_status_once_and_served_when_mended(town: Town) -> None:
    await town.submit(template={"spec": {"serviceAccountName": "admin"}})
    async with running_operator(town.options):
        status = await town.reaches("Pending")
        status = await until(lambda: with_reason(town, "InvalidSpec"))
        version = (await town.job())["metadata"]["resourceVersion"]
        town.kubelet.training["other"] = town.kubelet.training["gpt2"]
        await town.submit("other", until=3)
        await town.reaches("Training", "other", step=3)
        assert (await town.job())["metadata"]["resourceVersion"] == version

        await town.change({"workers": {"template": {"spec": {"serviceAccountName": None}}}})
        mended = await town.reaches("Training", step=3)

    assert "serviceAccountName: 'admin' is not allowed" in status.message
    assert truths(status)["InvalidSpec"] == "True"
    assert truths(mended)["InvalidSpec"] == "False"


async def with_reason(town: Town, reason: str) -> JobStatus | None:
    status = await town.status()
    return status if status.reason == reason else None


def truths(status: JobStatus) -> dict[str, str]:
    return {condition.type: condition.status for condition in status.conditions}


async def test_a_bug_in_serving_one_job_is_told_tried_again_and_kept_from_others(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, failing = JobService.decide, [True]

    async def broken(service: JobService) -> Reconciliation:
        round_ = await look(service)
        if failing[0] and round_.status.total_steps == 77:
            raise ZeroDivisionError("a bug")
        return round_

    monkeypatch.setattr(JobService, "decide", broken)
    await town.submit("bad", total=77)
    await town.submit("good")
    async with running_operator(town.options):
        await town.reaches("Training", "good", step=3)

        async def told() -> JobStatus | None:
            status = await town.status("bad")
            return status if truths(status).get("InternalError") == "True" else None

        status = await until(told)
        failing[0] = False
        healed = await town.reaches("Training", "bad", step=3)
        events, _ = await town.api.list(EVENTS, town.namespace)

    condition = condition_of(status.conditions, "InternalError")
    assert condition is not None
    assert "ZeroDivisionError: a bug" in condition.message
    assert truths(healed)["InternalError"] == "False"
    assert "InternalError" in {event["reason"] for event in events if event["involvedObject"]["name"] == "bad"}


async def test_an_agent_that_comes_when_its_job_is_over_is_told_to_go(town: Town) -> None:
    job = await town.submit(until=10, total=10)
    async with running_operator(town.options) as running:
        await town.reaches("Succeeded")
        uid = job["metadata"]["uid"]
        await until(lambda: running.operator.acting.jobs.is_at_rest(uid))
        await town.api.create(PODS, town.namespace, next_attempt_of((await town.pods())[0]))
        late = await until(lambda: next((a for a in town.kubelet.agents.values() if a.worker.attempt == 1), None))

        await asyncio.wait_for(late.exited.wait(), 10)

    assert [message.kind for message in late.heard] == ["shutdown"]


def next_attempt_of(pod: Object) -> Object:
    """What an operator that died in the middle of a call may have asked for."""
    metadata = pod["metadata"]
    labels = {**metadata["labels"], "pretrain.dev/attempt": "1"}
    kept = {"name": metadata["name"][:-1] + "1", "labels": labels, "ownerReferences": metadata["ownerReferences"]}
    spec = {key: value for key, value in pod["spec"].items() if key != "nodeName"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": kept, "spec": spec}


async def test_idle_jobs_cost_no_write(town: Town, proxy: ApiProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "RESYNC_SECONDS", 0.2)
    options = town.options.model_copy(update={"kubeconfig": proxy.kubeconfig})
    await town.submit("idle")
    await town.submit("over", until=10, total=10)
    async with running_operator(options) as running:
        await town.reaches("Training", "idle", step=3)
        await town.reaches("Succeeded", "over")
        await until(lambda: running.operator.acting.jobs.waiting() == 0)
        await asyncio.sleep(1.0)  # goodput and the like are written a moment after the last step
        before = len([call for call in proxy.writes if "/leases/" not in call.path])
        looks = reconciles(running)

        await until(lambda: reconciles(running) >= looks + 5)

    assert [call for call in proxy.writes if "/leases/" not in call.path][before:] == []


def reconciles(running: RunningOperator) -> float:
    text = running.operator.metrics.exposition().decode()
    counts = (line for line in text.splitlines() if line.startswith("pretrain_operator_reconcile_seconds_count"))
    return sum(float(line.split()[-1]) for line in counts)


async def test_a_replica_that_loses_the_lease_stops_acting_and_says_so(town: Town) -> None:
    await town.submit()
    async with running_operator(town.options) as running:
        before = await town.reaches("Training", step=3)
        taken = {"spec": {"holderIdentity": "another", "leaseTransitions": 2_000_000_000}}
        await town.api.merge_patch(LEASES, town.namespace, town.options.lease_name, taken)

        ended = await asyncio.wait_for(running.ended(), 20)

        assert isinstance(ended, BaseExceptionGroup)
        assert ended.subgroup(LeaseLost) is not None
        assert not running.operator.active.is_set()
        assert not await answers(town.options.agents_port, "healthz")
    assert town.kubelet.agents["gpt2-" + pod_suffix(before, 0)].exited.is_set() is False


def pod_suffix(status: JobStatus, slot: int) -> str:
    return f"{status.job_uid[:5]}-{slot}-0"


async def test_nothing_is_written_by_a_replica_that_may_no_longer_act(
    api: Api, namespace: str, apiserver: Path
) -> None:
    transport, allowed = await Transport.connect(apiserver), [True]

    async def may_write() -> bool:
        return allowed[0]

    fenced = Api(FencedTransport(transport, may_write), lambda verb, code: None, 4)
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "one"}}
    await fenced.create(CONFIG_MAPS, namespace, body)

    allowed[0] = False

    uid = (await fenced.get(CONFIG_MAPS, namespace, "one"))["metadata"]["uid"]
    for write in (
        fenced.create(CONFIG_MAPS, namespace, {**body, "metadata": {"name": "two"}}),
        fenced.merge_patch(CONFIG_MAPS, namespace, "one", {"data": {"k": "v"}}),
        fenced.delete(CONFIG_MAPS, namespace, "one", uid=uid),
    ):
        with pytest.raises(ApiError, match="no longer holds the lease"):
            await write
    await transport.close()


async def test_the_service_leads_to_the_active_replica_only(api: Api, namespace: str) -> None:
    for name, instance in (("new", "mine"), ("old", "mine"), ("foreign", "theirs")):
        labels = {"app.kubernetes.io/name": "pretrain-operator", "app.kubernetes.io/instance": instance}
        labels |= {} if name == "new" else {"pretrain.dev/active": "true"}
        await api.create(PODS, namespace, an_operator_pod(name, labels))

    await claim(api, namespace, "new")

    found, _ = await api.list(PODS, namespace, label_selector="pretrain.dev/active=true")
    assert {pod["metadata"]["name"] for pod in found} == {"new", "foreign"}


def an_operator_pod(name: str, labels: dict[str, str]) -> Object:
    container = {"name": "operator", "image": "operator"}
    metadata = {"name": name, "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [container]}}


async def test_agents_connect_by_tls_with_the_certificate_in_the_folder(
    api: Api, namespace: str, apiserver: Path, tmp_path: Path
) -> None:
    authority, folder = Authority(), tmp_path / "tls"
    folder.mkdir()
    authority.server(folder, "127.0.0.1")
    (folder / "ca.crt").write_text(authority.pem)
    async with a_town(api, namespace, apiserver, tmp_path, tls_dir=folder) as town:
        await town.submit()
        async with running_operator(town.options):
            await town.reaches("Training", step=3)

        maps, _ = await api.list(CONFIG_MAPS, namespace, label_selector=UID_LABEL)
    assert maps[0]["data"]["ca.crt"] == authority.pem


async def test_the_api_servers_bad_moments_are_lived_through(town: Town, proxy: ApiProxy) -> None:
    def write_to(resource: str) -> Matches:
        return lambda call: call.write and f"/{resource}" in call.path

    proxy.plan(Answer(500, "InternalError", "etcd is away"), write_to("configmaps"))
    proxy.plan(Answer(429, "TooManyRequests", "busy", retry_after=1), write_to("pods"))
    proxy.plan(Answer(500, "InternalError", "etcd is away"), write_to("pods"), times=2)
    proxy.plan(Cut("answer lost"), write_to("pods"))
    proxy.plan(Answer(409, "Conflict", "somebody was quicker"), write_to("pretrainjobs"), times=2)
    proxy.plan(Answer(500, "InternalError", "etcd is away"), write_to("events"))
    await town.submit()

    async with running_operator(town.options.model_copy(update={"kubeconfig": proxy.kubeconfig})):
        await town.reaches("Training", step=3)
        workers = [worker_pod(pod) for pod in await town.pods()]

    assert [(worker.slot, worker.attempt) for worker in workers if worker] == [(0, 0), (1, 0), (2, 0)]


async def test_the_process_ends_at_once_when_told_to_and_training_goes_on(town: Town, server: ApiServer) -> None:
    await town.submit()
    options = town.options
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pretrain_operator.kubernetes", "--coordinator-host=127.0.0.1", "--listen=127.0.0.1",
        f"--namespace={town.namespace}", f"--pod-namespace={town.namespace}", f"--agents-port={options.agents_port}",
        f"--metrics-port={options.metrics_port}", f"--probe-port={options.probe_port}",
        f"--audience={options.audience}",
        f"--kubeconfig={options.kubeconfig}", "--lease-seconds=40",
    )  # fmt: skip
    try:
        await town.reaches("Training", step=3)
        process.terminate()
        status = await asyncio.wait_for(process.wait(), 20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    lease = await town.api.get(LEASES, town.namespace, options.lease_name)
    assert status == 0
    assert lease["spec"]["holderIdentity"] == ""
    assert len(town.kubelet.agents) == 3


async def test_an_error_in_the_watch_of_jobs_ends_nothing(town: Town, proxy: ApiProxy) -> None:
    async with running_operator(town.options.model_copy(update={"kubeconfig": proxy.kubeconfig})) as running:
        await running.operator.active.wait()
        await proxy.heard(lambda call: call.watch and "/pretrainjobs" in call.path)
        await proxy.watching(2)  # pods, jobs
        await proxy.say_error(500, "InternalError")

        await town.submit()
        await town.reaches("Training", step=1)
