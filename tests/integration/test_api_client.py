"""The client against a real API server: what each verb promises, and every way an answer can fail to come."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio.config import incluster_config

from pretrain_operator.kubernetes.client import api as api_module
from pretrain_operator.kubernetes.client.api import (
    CONFIG_MAPS,
    EVENTS,
    LEASES,
    NODES,
    PODS,
    Api,
    ApiError,
    Object,
    Resource,
)
from support.kubernetes.api_proxy import Answer, ApiProxy, Call, Cut, Hang, write_kubeconfig
from support.kubernetes.api_server import ApiServer, connected

SELF_REVIEWS = Resource("authentication.k8s.io", "v1", "selfsubjectreviews")


def a_map(name: str, value: str = "v", **labels: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": labels},
        "data": {"k": value},
    }


def always(_: Call) -> bool:
    return True


async def refusal_of(call: Any) -> ApiError:
    with pytest.raises(ApiError) as refused:
        await call
    return refused.value


# ---- what each verb promises


async def test_what_was_created_is_read_back(api: Api, namespace: str) -> None:
    made = await api.create(CONFIG_MAPS, namespace, a_map("a"))

    assert await api.get(CONFIG_MAPS, namespace, "a") == made
    assert made["data"] == {"k": "v"}


async def test_what_is_not_there_is_not_found(api: Api, namespace: str) -> None:
    error = await refusal_of(api.get(CONFIG_MAPS, namespace, "a"))

    assert (error.status, error.reason) == (404, "NotFound")
    assert str(error) == error.message == 'configmaps "a" not found'


async def test_a_name_is_given_once(api: Api, namespace: str) -> None:
    await api.create(CONFIG_MAPS, namespace, a_map("a"))

    error = await refusal_of(api.create(CONFIG_MAPS, namespace, a_map("a")))

    assert (error.status, error.reason) == (409, "AlreadyExists")


async def test_a_list_holds_all_pages_of_one_namespace_and_says_what_each_object_is(
    api: Api, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_module, "PAGE", 2)
    for name in "abcde":
        await api.create(CONFIG_MAPS, namespace, a_map(name))

    items, version = await api.list(CONFIG_MAPS, namespace)

    assert [(item["apiVersion"], item["kind"], item["metadata"]["name"]) for item in items] == [
        ("v1", "ConfigMap", name) for name in "abcde"
    ]
    assert int(version) >= max(int(item["metadata"]["resourceVersion"]) for item in items)


async def test_a_list_can_be_of_all_namespaces_and_of_one_label(api: Api, namespace: str) -> None:
    await api.create(CONFIG_MAPS, namespace, a_map("a", of=namespace))
    await api.create(CONFIG_MAPS, namespace, a_map("b"))

    everywhere, _ = await api.list(CONFIG_MAPS, None, label_selector=f"of={namespace}")

    assert [item["metadata"]["name"] for item in everywhere] == ["a"]
    assert (await api.list(NODES, None))[0] == []


async def test_a_list_whose_pages_expire_begins_again(
    api: Api, proxied: Api, proxy: ApiProxy, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_module, "PAGE", 2)
    for name in "abc":
        await api.create(CONFIG_MAPS, namespace, a_map(name))
    proxy.plan(Answer(410, "Expired"), lambda call: "continue=" in call.path)

    items, _ = await proxied.list(CONFIG_MAPS, namespace)

    assert [item["metadata"]["name"] for item in items] == ["a", "b", "c"]


async def test_a_merge_patch_changes_what_it_names_and_removes_what_is_null(api: Api, namespace: str) -> None:
    await api.create(CONFIG_MAPS, namespace, a_map("a", keep="1", drop="2"))

    patched = await api.merge_patch(CONFIG_MAPS, namespace, "a", {"metadata": {"labels": {"drop": None, "new": "3"}}})

    assert patched["metadata"]["labels"] == {"keep": "1", "new": "3"}


async def test_a_replacement_of_an_older_version_is_a_conflict(api: Api, namespace: str) -> None:
    made = await api.create(CONFIG_MAPS, namespace, a_map("a"))
    newer = await api.replace(CONFIG_MAPS, namespace, "a", {**made, "data": {"k": "2"}})

    error = await refusal_of(api.replace(CONFIG_MAPS, namespace, "a", {**made, "data": {"k": "3"}}))

    assert (error.status, error.reason) == (409, "Conflict")
    assert await api.get(CONFIG_MAPS, namespace, "a") == newer


async def test_what_is_deleted_is_gone_and_may_be_gone_before(api: Api, namespace: str) -> None:
    uid = (await api.create(CONFIG_MAPS, namespace, a_map("a")))["metadata"]["uid"]

    await api.delete(CONFIG_MAPS, namespace, "a", uid=uid)
    await api.delete(CONFIG_MAPS, namespace, "a", uid=uid)

    assert (await api.list(CONFIG_MAPS, namespace))[0] == []


async def test_a_delete_spares_another_object_of_the_same_name(api: Api, namespace: str) -> None:
    uid = (await api.create(CONFIG_MAPS, namespace, a_map("a")))["metadata"]["uid"]
    await api.delete(CONFIG_MAPS, namespace, "a", uid=uid)
    another = await api.create(CONFIG_MAPS, namespace, a_map("a"))

    await api.delete(CONFIG_MAPS, namespace, "a", uid=uid)

    assert await api.get(CONFIG_MAPS, namespace, "a") == another


async def test_a_delete_that_is_refused_for_another_reason_is_an_error(proxied: Api, proxy: ApiProxy) -> None:
    proxy.plan(Answer(409, "Conflict", "it is being changed"), always)

    error = await refusal_of(proxied.delete(PODS, "default", "a", uid="1"))

    assert error.message == "it is being changed"


async def test_a_delete_can_leave_no_time(api: Api, proxied: Api, proxy: ApiProxy, namespace: str) -> None:
    pod = {"metadata": {"name": "a"}, "spec": {"nodeName": "n", "containers": [{"name": "c", "image": "i"}]}}
    uid = (await api.create(PODS, namespace, pod))["metadata"]["uid"]

    await proxied.delete(PODS, namespace, "a", uid=uid)
    assert (await api.get(PODS, namespace, "a"))["metadata"]["deletionGracePeriodSeconds"] == 30
    await proxied.delete(PODS, namespace, "a", uid=uid, grace_seconds=0)

    assert (await refusal_of(api.get(PODS, namespace, "a"))).status == 404


async def test_paths_that_are_no_resources_can_be_read(api: Api) -> None:
    assert (await api.read("/openid/v1/jwks"))["keys"][0]["kty"] == "RSA"


async def test_each_request_is_counted_by_verb_and_code(apiserver: Path, namespace: str) -> None:
    heard: list[tuple[str, str]] = []
    async with connected(apiserver, on_call=lambda verb, code: heard.append((verb, code))) as api:
        await api.create(CONFIG_MAPS, namespace, a_map("a"))
        await refusal_of(api.create(CONFIG_MAPS, namespace, a_map("a")))
        await api.list(CONFIG_MAPS, namespace)
        await refusal_of(api.get(CONFIG_MAPS, namespace, "b"))

    assert heard == [("create", "201"), ("create", "409"), ("list", "200"), ("get", "404")]


# ---- who we are


async def test_who_has_no_right_is_told_what_right_is_missing(
    server: ApiServer, namespace: str, tmp_path: Path
) -> None:
    async with connected(server.service_account(namespace, "powerless", tmp_path)) as api:
        error = await refusal_of(api.list(PODS, namespace))

    assert (error.status, error.reason) == (403, "Forbidden")
    assert 'cannot list resource "pods"' in error.message


async def test_a_token_that_is_rotated_in_its_file_is_used(
    server: ApiServer, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("old", "new"):
        server.service_account(namespace, name, tmp_path)
    token = tmp_path / "token"
    token.write_text(server.token(namespace, "old"))
    _be_in_cluster(server, token, monkeypatch)
    async with connected() as api:
        before = await _whoami(api)
        token.write_text(server.token(namespace, "new"))
        monkeypatch.setattr(incluster_config, "datetime", _LaterDatetime)
        after = await _whoami(api)

    assert [before, after] == [f"system:serviceaccount:{namespace}:{name}" for name in ("old", "new")]


def _be_in_cluster(server: ApiServer, token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = server.kubectl("config", "view", "-o", "jsonpath={..cluster.server} {..cluster.certificate-authority}")
    address, ca = view.split()
    host, port = address.removeprefix("https://").split(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", ca)


class _LaterDatetime:
    """The module `datetime`, two minutes on."""

    timedelta = datetime.timedelta

    class datetime:
        @staticmethod
        def now() -> datetime.datetime:
            return datetime.datetime.now() + datetime.timedelta(minutes=2)


async def _whoami(api: Api) -> str:
    review = {"apiVersion": SELF_REVIEWS.api_version, "kind": "SelfSubjectReview"}
    return (await api.create(SELF_REVIEWS, None, review))["status"]["userInfo"]["username"]


# ---- answers that fail to come


async def test_a_busy_server_is_asked_again_when_it_says(
    api: Api, proxied: Api, proxy: ApiProxy, namespace: str
) -> None:
    proxy.plan(Answer(429, "TooManyRequests", retry_after=1), always)
    began = asyncio.get_running_loop().time()

    await proxied.create(CONFIG_MAPS, namespace, a_map("a"))

    assert asyncio.get_running_loop().time() - began >= 1.0
    assert len(proxy.calls) == 2


async def test_a_server_that_stays_busy_is_an_error_that_says_for_how_long(
    proxied: Api, proxy: ApiProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_module, "LONGEST_PAUSE_SECONDS", 0.01)
    proxy.plan(Answer(429, "TooManyRequests", "too many", retry_after=7), always, times=10)

    error = await refusal_of(proxied.get(PODS, "default", "a"))

    assert (error.status, error.retry_after, error.message) == (429, 7.0, "too many")
    assert len(proxy.calls) == api_module.BUSY_TRIES


async def test_an_error_of_the_server_is_not_hidden(proxied: Api, proxy: ApiProxy) -> None:
    proxy.plan(Answer(500, "InternalError", "etcd is away"), always)

    error = await refusal_of(proxied.get(PODS, "default", "a"))

    assert (error.status, error.reason, error.message) == (500, "InternalError", "etcd is away")
    assert len(proxy.calls) == 1


async def test_a_write_whose_answer_is_lost_is_no_answer_though_it_was_done(
    api: Api, proxied: Api, proxy: ApiProxy, namespace: str
) -> None:
    proxy.plan(Cut("answer lost"), always)

    error = await refusal_of(proxied.create(CONFIG_MAPS, namespace, a_map("a")))

    assert (error.status, error.reason) == (0, "Unreachable")
    assert (await api.get(CONFIG_MAPS, namespace, "a"))["data"] == {"k": "v"}


async def test_a_write_that_was_cut_before_it_arrived_is_no_answer(
    api: Api, proxied: Api, proxy: ApiProxy, namespace: str
) -> None:
    proxy.plan(Cut("before"), always)

    error = await refusal_of(proxied.create(CONFIG_MAPS, namespace, a_map("a")))

    assert error.status == 0
    assert (await refusal_of(api.get(CONFIG_MAPS, namespace, "a"))).status == 404


async def test_no_server_is_no_answer(tmp_path: Path) -> None:
    write_kubeconfig(tmp_path / "nobody", "http://127.0.0.1:1")

    async with connected(tmp_path / "nobody") as api:
        error = await refusal_of(api.get(PODS, "default", "a"))

    assert error.status == 0
    assert "cannot be reached" in error.message


async def test_a_server_that_hangs_is_no_answer(proxied: Api, proxy: ApiProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_module, "CALL_SECONDS", 0.2)
    proxy.plan(Hang(), always)

    error = await refusal_of(proxied.get(PODS, "default", "a"))

    assert (error.status, error.reason) == (0, "Timeout")


async def test_calls_wait_for_their_turn_but_the_lease_does_not(proxy: ApiProxy, namespace: str) -> None:
    async with connected(proxy.kubeconfig, concurrency=1) as api:
        proxy.plan(Hang(), lambda call: "/pods/slow" in call.path)
        slow = asyncio.create_task(api.get(PODS, namespace, "slow"))
        await proxy.heard(always)
        queued = asyncio.create_task(api.get(PODS, namespace, "queued"))

        assert (await refusal_of(api.get(LEASES, namespace, "lease"))).status == 404
        assert [call.path.rpartition("/")[2] for call in proxy.calls] == ["slow", "lease"]

        slow.cancel()
        assert (await refusal_of(queued)).status == 404


# ---- watches


async def first(stream: AsyncIterator[tuple[str, Object]], count: int) -> list[tuple[str, Object]]:
    """The first events that are no bookmarks."""
    events: list[tuple[str, Object]] = []
    async with asyncio.timeout(20):
        async for type_, object_ in stream:
            if type_ != "BOOKMARK":
                events.append((type_, object_))
            if len(events) == count:
                break
    return events


async def test_a_watch_tells_what_happened_after_a_version(api: Api, namespace: str) -> None:
    _, version = await api.list(CONFIG_MAPS, namespace)
    made = await api.create(CONFIG_MAPS, namespace, a_map("a"))
    changed = await api.merge_patch(CONFIG_MAPS, namespace, "a", {"data": {"k": "2"}})
    await api.delete(CONFIG_MAPS, namespace, "a", uid=made["metadata"]["uid"])

    async with contextlib.aclosing(
        api.watch(CONFIG_MAPS, namespace, resource_version=version, timeout_seconds=20)
    ) as stream:
        events = await first(stream, 3)

    assert [type_ for type_, _ in events] == ["ADDED", "MODIFIED", "DELETED"]
    assert [event for _, event in events][:2] == [made, changed]


async def test_a_watch_without_news_ends_in_time_with_a_bookmark(api: Api, namespace: str) -> None:
    _, version = await api.list(CONFIG_MAPS, namespace)

    stream = api.watch(CONFIG_MAPS, namespace, resource_version=version, timeout_seconds=3)
    async with asyncio.timeout(20):
        events = [type_ async for type_, _ in stream]

    assert set(events) <= {"BOOKMARK"}


async def test_a_watch_takes_objects_of_any_size(api: Api, namespace: str) -> None:
    _, version = await api.list(CONFIG_MAPS, namespace)
    large = await api.create(CONFIG_MAPS, namespace, a_map("large", "x" * 1_000_000))

    async with contextlib.aclosing(
        api.watch(CONFIG_MAPS, namespace, resource_version=version, timeout_seconds=20)
    ) as stream:
        assert await first(stream, 1) == [("ADDED", large)]


async def test_a_version_that_is_forgotten_is_expired(server: ApiServer, api: Api, namespace: str) -> None:
    _, version = await api.list(EVENTS, namespace)
    for name in "ab":
        made = await api.create(CONFIG_MAPS, namespace, a_map(name))
    server.forget_history(made["metadata"]["resourceVersion"])

    stream = api.watch(EVENTS, namespace, resource_version=version, timeout_seconds=20)
    error = await refusal_of(first(stream, 1))

    assert (error.status, error.reason) == (410, "Expired")


@pytest.mark.parametrize(("code", "reason"), [(410, "Expired"), (500, "InternalError")])
async def test_an_error_in_a_watch_is_raised(
    proxied: Api, proxy: ApiProxy, namespace: str, code: int, reason: str
) -> None:
    _, version = await proxied.list(CONFIG_MAPS, namespace)
    stream = proxied.watch(CONFIG_MAPS, namespace, resource_version=version, timeout_seconds=20)
    hears = asyncio.create_task(refusal_of(first(stream, 1)))
    await proxy.watching()

    await proxy.say_error(code, reason)

    error = await hears
    assert (error.status, error.reason, error.message) == (code, reason, f"{reason}, it says")


async def test_a_watch_that_breaks_off_is_no_answer(proxied: Api, proxy: ApiProxy, namespace: str) -> None:
    _, version = await proxied.list(CONFIG_MAPS, namespace)

    async def watch() -> ApiError:
        stream = proxied.watch(CONFIG_MAPS, namespace, resource_version=version, timeout_seconds=20)
        return await refusal_of(first(stream, 1))

    hears = asyncio.create_task(watch())
    await proxy.watching()
    proxy.reset()
    assert (await hears).reason == "Unreachable"

    hears = asyncio.create_task(watch())
    await proxy.watching()
    await proxy.cut_line()
    assert (await hears).reason == "Garbled"


async def test_a_watch_that_hangs_is_no_answer(
    api: Api, proxied: Api, proxy: ApiProxy, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_module, "WATCH_GRACE_SECONDS", 0.2)
    _, version = await proxied.list(CONFIG_MAPS, namespace)
    stream = proxied.watch(CONFIG_MAPS, namespace, resource_version=version, timeout_seconds=1)
    hears = asyncio.create_task(refusal_of(first(stream, 1)))
    await proxy.watching()

    proxy.freeze()
    await api.create(CONFIG_MAPS, namespace, a_map("unheard"))

    assert (await hears).reason == "Timeout"
