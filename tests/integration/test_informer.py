"""The informer against a real API server, whose watches break in every way they can."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pretrain_operator.kubernetes.client import api as api_module
from pretrain_operator.kubernetes.client.api import CONFIG_MAPS, EVENTS, Api, Object, Resource
from pretrain_operator.kubernetes.client.informer import Informer
from support.kubernetes.api_proxy import Answer, ApiProxy, Call, Cut
from support.kubernetes.api_server import ApiServer, connected

ROLES = Resource("rbac.authorization.k8s.io", "v1", "roles")
ROLE_BINDINGS = Resource("rbac.authorization.k8s.io", "v1", "rolebindings")


def a_map(name: str, value: str = "", **labels: str) -> Object:
    return {"metadata": {"name": name, "labels": labels}, "data": {"k": value}}


def an_event(namespace: str, name: str) -> Object:
    return {"metadata": {"name": name}, "involvedObject": {"namespace": namespace, "kind": "Pod"}, "reason": "r"}


def a_list(call: Call) -> bool:
    return call.method == "GET" and not call.watch


def a_watch(call: Call) -> bool:
    return call.watch


@dataclass
class Heard:
    """What a handler was told."""

    events: list[tuple[str, str]] = field(default_factory=list)
    """Type, name and value."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, type_: str, object_: Object) -> None:
        self.events.append((type_, object_["metadata"]["name"] + object_.get("data", {}).get("k", "")))
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def has(self, *events: tuple[str, str]) -> None:
        """Return when exactly this was heard, in this order."""
        await self.until(lambda: len(self.events) >= len(events))
        assert self.events == [*events]


@contextlib.asynccontextmanager
async def running(informer: Informer) -> AsyncIterator[Heard]:
    """The informer runs and knows what there was."""
    heard = Heard()
    informer.subscribe(heard)
    task = asyncio.create_task(informer.run())
    try:
        async with asyncio.timeout(30):
            await informer.synced()
        yield heard
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def remove(api: Api, namespace: str, name: str) -> None:
    made = await api.get(CONFIG_MAPS, namespace, name)
    await api.delete(CONFIG_MAPS, namespace, name, uid=made["metadata"]["uid"])


# ---- while all is well


async def test_what_there_was_and_what_comes_is_told_once(api: Api, namespace: str) -> None:
    await api.create(CONFIG_MAPS, namespace, a_map("a", "1"))
    informer = Informer(api, CONFIG_MAPS, namespace)

    async with running(informer) as heard:
        changed = await api.merge_patch(CONFIG_MAPS, namespace, "a", {"data": {"k": "2"}})
        await api.create(CONFIG_MAPS, namespace, a_map("b", "1"))
        await heard.until(lambda: len(heard.events) == 3)
        del changed["metadata"]["managedFields"]  # nobody reads them, and they are half of a pod
        assert informer.get(namespace, "a") == changed
        await remove(api, namespace, "a")

        await heard.has(("ADDED", "a1"), ("MODIFIED", "a2"), ("ADDED", "b1"), ("DELETED", "a2"))
        assert informer.get(namespace, "a") is None
        assert [item["metadata"]["name"] for item in informer.all()] == ["b"]


async def test_only_what_has_the_label_is_known(api: Api, namespace: str) -> None:
    await api.create(CONFIG_MAPS, namespace, a_map("a", mine="yes"))
    await api.create(CONFIG_MAPS, namespace, a_map("b"))
    informer = Informer(api, CONFIG_MAPS, namespace, label_selector="mine=yes")

    async with running(informer) as heard:
        await api.merge_patch(CONFIG_MAPS, namespace, "a", {"metadata": {"labels": {"mine": None}}})
        await api.merge_patch(CONFIG_MAPS, namespace, "b", {"metadata": {"labels": {"mine": "yes"}}})

        await heard.has(("ADDED", "a"), ("DELETED", "a"), ("ADDED", "b"))


async def test_objects_are_found_by_the_values_of_the_index_they_have_now(api: Api, namespace: str) -> None:
    await api.create(CONFIG_MAPS, namespace, a_map("a", "x"))
    await api.create(CONFIG_MAPS, namespace, a_map("b", "x"))
    informer = Informer(api, CONFIG_MAPS, namespace, index=lambda item: [item["data"]["k"]])

    def names(value: str) -> list[str]:
        return [item["metadata"]["name"] for item in informer.indexed(value)]

    async with running(informer) as heard:
        assert names("x") == ["a", "b"]
        await api.merge_patch(CONFIG_MAPS, namespace, "a", {"data": {"k": "y"}})
        await remove(api, namespace, "b")
        await heard.until(lambda: len(heard.events) == 4)

        assert (names("x"), names("y")) == ([], ["a"])


async def test_watches_end_and_begin_again_and_silence_is_news(
    api: Api, proxied: Api, proxy: ApiProxy, namespace: str
) -> None:
    informer = Informer(proxied, CONFIG_MAPS, namespace, watch_seconds=2)

    async with running(informer) as heard:
        await asyncio.wait_for(proxy.heard(a_watch, 3), 30)
        assert informer.age < 2.5
        await api.create(CONFIG_MAPS, namespace, a_map("a"))
        await heard.has(("ADDED", "a"))

    assert sum(map(a_list, proxy.calls)) == 1


# ---- while it is not


async def test_a_watch_that_breaks_goes_on_where_it_was(
    api: Api, proxied: Api, proxy: ApiProxy, namespace: str
) -> None:
    async with running(Informer(proxied, CONFIG_MAPS, namespace)) as heard:
        await proxy.watching()
        proxy.freeze()
        await api.create(CONFIG_MAPS, namespace, a_map("a", "1"))
        await api.merge_patch(CONFIG_MAPS, namespace, "a", {"data": {"k": "2"}})
        proxy.reset()

        await heard.has(("ADDED", "a1"), ("MODIFIED", "a2"))

    assert sum(map(a_list, proxy.calls)) == 1


async def test_half_a_line_is_not_the_end(api: Api, proxied: Api, proxy: ApiProxy, namespace: str) -> None:
    async with running(Informer(proxied, CONFIG_MAPS, namespace)) as heard:
        await proxy.watching()
        await proxy.cut_line()
        await api.create(CONFIG_MAPS, namespace, a_map("a"))

        await heard.has(("ADDED", "a"))


async def test_a_watch_that_hangs_is_found_out(
    api: Api, proxied: Api, proxy: ApiProxy, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_module, "WATCH_GRACE_SECONDS", 0.5)
    async with running(Informer(proxied, CONFIG_MAPS, namespace, watch_seconds=1)) as heard:
        await proxy.watching()
        proxy.freeze()
        await api.create(CONFIG_MAPS, namespace, a_map("a"))

        await heard.has(("ADDED", "a"))


async def test_a_deletion_in_a_gap_that_is_too_long_to_watch_is_told(
    server: ApiServer, api: Api, proxied: Api, proxy: ApiProxy, namespace: str
) -> None:
    made = await api.create(EVENTS, namespace, an_event(namespace, "a"))
    async with running(Informer(proxied, EVENTS, namespace)) as heard:
        await proxy.watching()
        proxy.freeze()
        await api.delete(EVENTS, namespace, "a", uid=made["metadata"]["uid"])
        later = await api.create(EVENTS, namespace, an_event(namespace, "b"))
        server.forget_history(later["metadata"]["resourceVersion"])
        proxy.reset()

        await heard.has(("ADDED", "a"), ("DELETED", "a"), ("ADDED", "b"))

    assert sum(map(a_list, proxy.calls)) == 2


@pytest.mark.parametrize("how", ["in the watch", "instead of it"])
async def test_after_a_gap_all_that_changed_in_it_is_told(
    api: Api, proxied: Api, proxy: ApiProxy, namespace: str, how: str
) -> None:
    for name in ("deleted", "replaced", "changed", "same"):
        await api.create(CONFIG_MAPS, namespace, a_map(name, "1"))
    informer = Informer(proxied, CONFIG_MAPS, namespace, index=lambda item: [item["data"]["k"]])
    async with running(informer) as heard:
        await proxy.watching()
        proxy.freeze()
        heard.events.clear()
        await remove(api, namespace, "deleted")
        await remove(api, namespace, "replaced")
        await api.create(CONFIG_MAPS, namespace, a_map("replaced", "2"))
        await api.merge_patch(CONFIG_MAPS, namespace, "changed", {"data": {"k": "2"}})
        if how == "in the watch":
            await proxy.say_error(410, "Expired")
        else:
            proxy.plan(Answer(410, "Expired"), a_watch)
            proxy.reset()
        await api.create(CONFIG_MAPS, namespace, a_map("new", "3"))

        await heard.until(lambda: ("ADDED", "new3") in heard.events)
        assert sorted(heard.events) == [
            ("ADDED", "new3"),
            ("ADDED", "replaced2"),
            ("DELETED", "deleted1"),
            ("DELETED", "replaced1"),
            ("MODIFIED", "changed2"),
        ]
        assert heard.events.index(("DELETED", "replaced1")) < heard.events.index(("ADDED", "replaced2"))
        assert {item["metadata"]["name"] for item in informer.indexed("2")} == {"replaced", "changed"}
        assert [item["metadata"]["name"] for item in informer.indexed("1")] == ["same"]


@pytest.mark.parametrize("code", [429, 500])
async def test_an_error_in_a_watch_that_says_nothing_of_its_version_costs_no_list(
    api: Api, proxied: Api, proxy: ApiProxy, namespace: str, code: int
) -> None:
    async with running(Informer(proxied, CONFIG_MAPS, namespace)) as heard:
        await proxy.watching()
        proxy.freeze()
        await api.create(CONFIG_MAPS, namespace, a_map("a"))
        await proxy.say_error(code, "Trouble")

        await heard.has(("ADDED", "a"))

    assert sum(map(a_list, proxy.calls)) == 1


async def test_a_busy_server_is_left_alone_for_as_long_as_it_says(
    api: Api, proxied: Api, proxy: ApiProxy, namespace: str
) -> None:
    loop = asyncio.get_running_loop()
    async with running(Informer(proxied, CONFIG_MAPS, namespace)) as heard:
        await proxy.watching()
        proxy.plan(Answer(429, "TooManyRequests", retry_after=2), a_watch)
        await api.create(CONFIG_MAPS, namespace, a_map("a"))
        await heard.has(("ADDED", "a"))
        heard.events.clear()
        proxy.reset()
        await proxy.heard(a_watch, 2)
        began = loop.time()
        await proxy.heard(a_watch, 3)

        assert loop.time() - began >= 1.9

    assert sum(map(a_list, proxy.calls)) == 1


async def test_a_version_from_which_no_watch_comes_about_is_given_up(
    api: Api, proxied: Api, proxy: ApiProxy, namespace: str
) -> None:
    async with running(Informer(proxied, CONFIG_MAPS, namespace)) as heard:
        await proxy.watching()
        proxy.plan(Answer(500, "InternalError"), a_watch, times=3)
        proxy.reset()
        await api.create(CONFIG_MAPS, namespace, a_map("a"))

        await heard.has(("ADDED", "a"))

    assert sum(map(a_list, proxy.calls)) == 2


async def test_it_starts_when_the_server_comes(api: Api, proxied: Api, proxy: ApiProxy, namespace: str) -> None:
    await api.create(CONFIG_MAPS, namespace, a_map("a"))
    proxy.plan(Cut("before"), a_list)
    proxy.plan(Answer(500, "InternalError"), a_list)

    async with running(Informer(proxied, CONFIG_MAPS, namespace)) as heard:
        await heard.has(("ADDED", "a"))


async def test_it_starts_when_the_right_to_read_is_given(
    server: ApiServer, api: Api, namespace: str, tmp_path: Path
) -> None:
    answers: list[str] = []
    kubeconfig = server.service_account(namespace, "reader", tmp_path)
    async with connected(kubeconfig, on_call=lambda verb, code: answers.append(code)) as powerless:
        informer = Informer(powerless, CONFIG_MAPS, namespace)
        task = asyncio.create_task(informer.run())
        while "403" not in answers:
            await asyncio.sleep(0.01)
        assert not informer.all()

        await allow(api, namespace, "reader")
        async with asyncio.timeout(30):
            await informer.synced()
        task.cancel()


async def allow(api: Api, namespace: str, account: str) -> None:
    rules = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["list", "watch"]}]
    await api.create(ROLES, namespace, {"metadata": {"name": account}, "rules": rules})
    subject = {"kind": "ServiceAccount", "name": account, "namespace": namespace}
    role = {"apiGroup": ROLES.group, "kind": "Role", "name": account}
    await api.create(ROLE_BINDINGS, namespace, {"metadata": {"name": account}, "roleRef": role, "subjects": [subject]})


async def test_what_a_handler_raises_ends_the_informer(api: Api, namespace: str) -> None:
    def broken(type_: str, object_: Object) -> None:
        raise ZeroDivisionError

    await api.create(CONFIG_MAPS, namespace, a_map("a"))
    informer = Informer(api, CONFIG_MAPS, namespace)
    informer.subscribe(broken)

    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(informer.run(), 30)
