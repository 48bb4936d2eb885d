"""The operator under exactly the role that the chart grants: none of its rights is missing, and none is too much."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from pretrain_api.status.job import JobStatus
from pretrain_operator.kubernetes.adapter import janitor
from pretrain_operator.kubernetes.client.api import JOBS, PODS, Api, ApiError, Resource
from pretrain_operator.kubernetes.server.app import running_operator
from pretrain_operator.kubernetes.server.options import Options, parse_options
from support.kubernetes.api_proxy import Answer, ApiProxy, Call, Cut, Matches, api_proxy
from support.kubernetes.api_server import ApiServer, connected, started_api_server
from support.kubernetes.app import Town, a_town, token_signer, until
from support.kubernetes.chart import Object, objects

SECRETS = Resource("", "v1", "secrets")
NAMESPACES = Resource("", "v1", "namespaces")
SERVICE_ACCOUNTS = Resource("", "v1", "serviceaccounts")
RELEASE = "pretrain-operator"
REPLICA = "pretrain-operator-0"
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_RESOURCE = re.compile(
    r"/(api|apis/(?P<group>[^/]+))/v[^/]+(/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<resource>[^/]+)(/(?P<name>[^/]+)(/(?P<sub>[^/]+))?)?"
)
READABLE_BY_ALL = re.compile(r"/\.well-known/openid-configuration|/openid/v1/jwks|/api(/v1)?|/apis(/[^/]+/v[^/]+)?")
"""What Kubernetes lets every service account read: keys for verifying tokens, and which resources there are."""


@dataclass(frozen=True, order=True)
class Right:
    """One verb on one resource."""

    namespace: str
    """Empty: all of them, or a resource that is in none."""
    group: str
    resource: str
    verb: str
    name: str = ""
    """The only object; empty: all."""

    def covers(self, need: Right) -> bool:
        """Whoever has this right may do that."""
        same = (self.group, self.resource, self.verb) == (need.group, need.resource, need.verb)
        return same and self.namespace in ("", need.namespace) and self.name in ("", need.name)


def granted(chart: dict[str, Object], namespace: str) -> set[Right]:
    """What the chart's bindings give to the operator."""
    rights: set[Right] = set()
    for binding in (it for key, it in chart.items() if key.startswith(("RoleBinding/", "ClusterRoleBinding/"))):
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": RELEASE, "namespace": namespace}]
        where = binding["metadata"].get("namespace", "")
        for rule in chart[f"{binding['roleRef']['kind']}/{binding['roleRef']['name']}"]["rules"]:
            rights |= {
                Right(where, group, resource, verb, name)
                for group in rule["apiGroups"]
                for resource in rule["resources"]
                for verb in rule["verbs"]
                for name in rule.get("resourceNames", [""])
            }
    return rights


def needed(call: Call) -> Right | None:
    """The right that a call needs; None: every service account has it."""
    path = urlsplit(call.path).path
    found = _RESOURCE.fullmatch(path)
    if found is None:
        assert READABLE_BY_ALL.fullmatch(path), path
        return None
    verb = VERBS.get(call.method) or ("get" if found["name"] else "watch" if call.watch else "list")
    resource = f"{found['resource']}/{found['sub']}" if found["sub"] else found["resource"]
    return Right(found["namespace"] or "", found["group"] or "", resource, verb, found["name"] or "")


@pytest.fixture(scope="module")
def own_server(helm: Path) -> Iterator[ApiServer]:
    """An API server of this module's own: an operator for all namespaces would serve the jobs of other tests, too."""
    with started_api_server() as server:
        yield server


@dataclass(frozen=True)
class Installation:
    """The chart's rights on an API server, a namespace with jobs, and a way in that remembers what was asked."""

    town: Town
    chart: dict[str, Object]
    proxy: ApiProxy
    kubeconfig: Path
    """Of the operator's service account."""
    options: Options
    """Flags as the chart gives them, but for addresses; through the proxy."""

    def rights(self) -> set[Right]:
        return granted(self.chart, self.options.pod_namespace)

    def used(self) -> set[Right]:
        return {right for call in self.proxy.calls if (right := needed(call)) is not None}


@pytest.fixture(params=["cluster-wide", "namespaced"])
async def installation(
    request: pytest.FixtureRequest, own_server: ApiServer, tmp_path: Path
) -> AsyncIterator[Installation]:
    suffix = uuid.uuid4().hex[:8]
    system, jobs = f"system-{suffix}", f"jobs-{suffix}"
    values = () if request.param == "cluster-wide" else (f"watchNamespace={jobs}",)
    chart = objects(*values, release=RELEASE, namespace=system)
    async with connected(own_server.kubeconfig) as api:
        for name in (system, jobs):
            body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            await api.create(NAMESPACES, None, body)
        applied = await asyncio.to_thread(apply_rights, own_server, chart)
        kubeconfig = await asyncio.to_thread(own_server.kubeconfig_of, system, RELEASE, tmp_path)
        deployment = chart[f"Deployment/{RELEASE}"]["spec"]["template"]
        for name in (REPLICA, "pretrain-operator-1"):
            await api.create(PODS, system, a_replica(name, deployment))
        async with api_proxy(kubeconfig, tmp_path) as proxy, a_town(api, jobs, own_server.kubeconfig, tmp_path) as town:
            yield Installation(town, chart, proxy, kubeconfig, flags(deployment, town.options, proxy, system))
        await asyncio.to_thread(own_server.kubectl, "delete", "-f", "-", "--wait=false", given=applied)


def apply_rights(server: ApiServer, chart: dict[str, Object]) -> Object:
    kinds = ("ServiceAccount/", "Role/", "RoleBinding/", "ClusterRole/", "ClusterRoleBinding/")
    items = [it for key, it in chart.items() if key.startswith(kinds)]
    rights = {"apiVersion": "v1", "kind": "List", "items": items}
    server.kubectl("apply", "-f", "-", given=rights)
    return rights


def a_replica(name: str, deployment: Object) -> Object:
    """A replica's pod as the Deployment would make it, the other one labelled by an earlier Lease."""
    labels = {**deployment["metadata"]["labels"], **({} if name == REPLICA else {"pretrain.dev/active": "true"})}
    spec = {"containers": [{"name": "operator", "image": "operator"}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


def flags(deployment: Object, ours: Options, proxy: ApiProxy, system: str) -> Options:
    """The chart's, so that the names in them are those in its roles."""
    [container] = deployment["spec"]["containers"]
    chart = parse_options(container["args"])
    return ours.model_copy(
        update={
            "namespace": chart.namespace,
            "lease_name": chart.lease_name,
            "pod_name": REPLICA,
            "pod_namespace": system,
            "kubeconfig": proxy.kubeconfig,
        }
    )


async def test_a_jobs_whole_life_needs_all_of_the_charts_rights_and_no_other(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(janitor, "ORPHAN_SECONDS", 0.0)
    monkeypatch.setattr(janitor, "ROUND_SECONDS", 0.1)
    town = installation.town
    lose_answers(installation.proxy)
    async with running_operator(installation.options) as running:
        await created(town)
        await recovers(town)
        await is_scaled(town)
        await is_suspended_twice(town)
        await turns_a_stranger_away(installation)
        await is_deleted(town)
        await ends_and_goes_by_itself(town)
        asked = refusals(running.operator.metrics.exposition().decode())

    rights, used = installation.rights(), installation.used()
    assert asked == []
    assert [need for need in sorted(used) if not any(right.covers(need) for right in rights)] == []
    assert [right for right in sorted(rights) if not any(right.covers(need) for need in used)] == []


def lose_answers(proxy: ApiProxy) -> None:
    """The operator has to look what became of its writes."""
    for resource in ("configmaps", "networkpolicies", "pods"):
        proxy.plan(Cut("answer lost"), creates(resource))
    proxy.plan(
        Answer(409, "Conflict", "somebody was quicker"), lambda call: call.path.partition("?")[0].endswith("/status")
    )


def creates(resource: str) -> Matches:
    return lambda call: call.method == "POST" and call.path.partition("?")[0].endswith(f"/{resource}")


async def created(town: Town) -> None:
    await town.submit(until=3, total=10_000, workers={"replicas": 3, "elastic": {"min": 1, "max": 4}})
    await town.reaches("Training", step=3)


async def recovers(town: Town) -> None:
    await town.kubelet.remove((await town.pods())[1]["metadata"]["name"])
    town.kubelet.training["gpt2"].until = 6
    await town.reaches("Training", step=6)


async def is_scaled(town: Town) -> None:
    town.kubelet.training["gpt2"].until = 9_999
    for replicas in (4, 2):
        await town.change({"workers": {"replicas": replicas}})
        await until(lambda wanted=replicas: trains_with(town, wanted))


async def trains_with(town: Town, workers: int) -> bool:
    status: JobStatus = await town.status()
    return status.phase == "Training" and [worker.state for worker in status.workers] == ["Training"] * workers


async def is_suspended_twice(town: Town) -> None:
    """Its Events come again."""
    for suspend, phase in ((True, "Suspended"), (False, "Training"), (True, "Suspended"), (False, "Training")):
        await town.change({"suspend": suspend})
        await town.reaches(phase)


async def turns_a_stranger_away(installation: Installation) -> None:
    """Its token is of a pod that the operator has to ask for."""
    town = installation.town
    sign = await token_signer(town.api, town.options.kubeconfig or Path())
    token = sign({"metadata": {"namespace": town.namespace, "name": "stranger", "uid": "u"}})
    url = f"http://127.0.0.1:{town.options.agents_port}/v1/jobs/{(await town.job())['metadata']['uid']}/agents"
    headers = {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        assert answer.status == 403


async def is_deleted(town: Town) -> None:
    await town.delete_job()
    await until(lambda: is_empty(town))  # by the operator: there is no garbage collector here


async def is_empty(town: Town) -> bool:
    return not await town.pods()


async def ends_and_goes_by_itself(town: Town) -> None:
    await town.submit("short", until=5, total=5, ttlAfterFinished="0s")

    async def gone() -> bool:
        try:
            await town.job("short")
        except ApiError as error:
            return error.status == 404
        return False

    await until(gone)


def refusals(exposed: str) -> list[str]:
    """The operator's calls that were forbidden, as its own metrics have them."""
    lines = [line for line in exposed.splitlines() if line.startswith("pretrain_operator_api_calls_total")]
    assert lines
    return [line for line in lines if 'code="403"' in line]


async def test_the_operator_can_read_no_secret(installation: Installation) -> None:
    town = installation.town
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3-credentials"}}
    await town.api.create(SECRETS, town.namespace, secret)

    async with connected(installation.kubeconfig) as operator:
        for namespace in (town.namespace, installation.options.pod_namespace):
            assert await is_forbidden(operator, SECRETS, namespace)
        assert not await is_forbidden(operator, JOBS, town.namespace)
        assert await is_forbidden(operator, JOBS, None) == (installation.options.namespace is not None)
        with pytest.raises(ApiError, match="forbidden"):
            await operator.get(SECRETS, town.namespace, "s3-credentials")


async def test_a_captured_operator_runs_pods_as_any_account_and_with_any_secret_of_the_namespaces_that_it_watches(
    installation: Installation,
) -> None:
    """The reason why docs/security.md recommends `watchNamespace`."""
    town, elsewhere = installation.town, f"elsewhere-{uuid.uuid4().hex[:8]}"
    await town.api.create(NAMESPACES, None, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": elsewhere}})
    for namespace in (town.namespace, elsewhere):
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "cluster-admin"}}
        await town.api.create(SERVICE_ACCOUNTS, namespace, account)

    async with connected(installation.kubeconfig) as operator:
        assert await starts_a_pod(operator, town.namespace)
        assert await starts_a_pod(operator, elsewhere) == (installation.options.namespace is None)


async def starts_a_pod(api: Api, namespace: str) -> bool:
    """Try to start a pod with another's service account and Secret."""
    spec = {
        "serviceAccountName": "cluster-admin",
        "containers": [{"name": "shell", "image": "shell"}],
        "volumes": [{"name": "theirs", "secret": {"secretName": "s3-credentials"}}],
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "captured"}, "spec": spec}
    try:
        await api.create(PODS, namespace, pod)
    except ApiError as error:
        if error.status != 403:
            raise
        return False
    return True


async def is_forbidden(api: Api, resource: Resource, namespace: str | None) -> bool:
    try:
        await api.list(resource, namespace)
    except ApiError as error:
        if error.status != 403:
            raise
        return True
    return False
