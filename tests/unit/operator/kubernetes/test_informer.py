"""Whatever a watch leaves out, what the informer holds and what it told come to what the API server has."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any, cast
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_api.backoff import Backoff
from pretrain_operator.kubernetes.client.api import CONFIG_MAPS, Api, ApiError, Object
from pretrain_operator.kubernetes.client.informer import Informer, Store

STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["put", "delete", "replace"]), st.sampled_from("abc"), st.sampled_from("xyz")),
        st.tuples(st.sampled_from(["break", "forget", "error 410", "error 500"]), st.just(""), st.just("")),
    ),
    max_size=40,
)


class Server:
    """Objects of one kind with their history, told by watches that break when the test says so."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.history: list[tuple[str, Object]] = []
        self.oldest = 0
        self.faults: list[str] = []
        self.calls: Counter[str] = Counter()
        self._changed = asyncio.Event()

    def put(self, name: str, value: str) -> None:
        old = self.objects.get(name)
        uid = old["metadata"]["uid"] if old is not None else f"uid-{len(self.history)}"
        self._say("MODIFIED" if old is not None else "ADDED", name, uid, value)

    def delete(self, name: str) -> None:
        if (old := self.objects.get(name)) is not None:
            self._say("DELETED", name, old["metadata"]["uid"], old["data"])

    def _say(self, type_: str, name: str, uid: str, value: str) -> None:
        version = str(len(self.history) + 1)
        metadata = {"namespace": "ns", "name": name, "uid": uid, "resourceVersion": version}
        object_: Object = {"metadata": metadata, "data": value, "status": {}}
        self.history.append((type_, object_))
        if type_ == "DELETED":
            del self.objects[name]
        else:
            self.objects[name] = object_
        self._changed.set()

    def fault(self, what: str) -> None:
        self.faults.append(what)
        self._changed.set()

    async def list(self, *_: object, label_selector: str) -> tuple[list[Object], str]:
        self.calls["list"] += 1
        await asyncio.sleep(0)
        return [as_sent(object_) for object_ in self.objects.values()], str(len(self.history))

    async def watch(
        self, *_: object, resource_version: str, label_selector: str, timeout_seconds: int
    ) -> AsyncGenerator[tuple[str, Object], None]:
        self.calls["watch"] += 1
        at = int(resource_version)
        if at < self.oldest:
            raise ApiError(410, "Expired", "too old")
        while True:
            if self.faults:
                self._strike(self.faults.pop(0))
            if at < len(self.history):
                at += 1
                type_, object_ = self.history[at - 1]
                yield type_, as_sent(object_)
                await asyncio.sleep(0)
                continue
            self._changed.clear()
            await self._changed.wait()

    def _strike(self, fault: str) -> None:
        if fault == "forget":
            self.oldest = len(self.history)
        code = int(fault.removeprefix("error ")) if fault.startswith("error") else 0
        raise ApiError(code, "Fault", fault)


def as_sent(object_: Object) -> Object:
    """With what nobody reads, and the informer does not keep."""
    sent = copy.deepcopy(object_)
    sent["metadata"]["managedFields"] = [{"manager": "kubelet"}]
    return {**sent, "status": {"images": [{"names": ["trainer"]}]}}


@settings(max_examples=60, deadline=None)
@given(STEPS, st.lists(st.integers(0, 3), min_size=40, max_size=40))
def test_what_is_held_and_what_was_told_are_what_the_server_has(
    steps: list[tuple[str, str, str]], rests: list[int]
) -> None:
    async def scenario() -> None:
        server, told = Server(), cast(dict[str, Object], {})
        informer = Informer(
            cast(Api, server), CONFIG_MAPS, "ns", index=lambda item: [item["data"], "all"], random=lambda: 0.0
        )

        def listen(type_: str, object_: Object) -> None:
            name = object_["metadata"]["name"]
            assert (name in told) == (type_ != "ADDED")
            if name in told:
                assert told[name]["metadata"]["uid"] == object_["metadata"]["uid"]
            if type_ == "DELETED":
                del told[name]
            else:
                told[name] = object_

        informer.subscribe(listen)
        running = asyncio.create_task(informer.run())
        for (what, name, value), rest in zip(steps, rests, strict=False):
            match what:
                case "put":
                    server.put(name, value)
                case "delete":
                    server.delete(name)
                case "replace":
                    server.delete(name)
                    server.put(name, value)
                case _:
                    server.fault(what)
            for _ in range(rest):
                await asyncio.sleep(0)
        server.put("last", "z")
        while informer.get("ns", "last") is None:
            await asyncio.sleep(0.001)
            assert not running.done()

        wanted = server.objects
        assert told == wanted
        assert {item["metadata"]["name"]: item for item in informer.all()} == wanted
        for value in "xyz":
            named = {item["metadata"]["name"] for item in informer.indexed(value)}
            assert named == {name for name, item in wanted.items() if item["data"] == value}
        assert len(informer.indexed("all")) == len(wanted)
        running.cancel()

    with mock.patch.object(Backoff, "delay", return_value=0.0):  # retries take no time
        asyncio.run(scenario())


def test_a_server_that_ends_each_watch_at_once_is_not_asked_without_pause() -> None:
    class Curt(Server):
        async def watch(self, *_: object, **__: Any) -> AsyncGenerator[tuple[str, Object], None]:
            self.calls["watch"] += 1
            await asyncio.sleep(0)
            return
            yield

    async def scenario() -> Counter[str]:
        server = Curt()
        running = asyncio.create_task(Informer(cast(Api, server), CONFIG_MAPS, "ns", random=lambda: 0.0).run())
        await asyncio.wait((running,), timeout=0.6)
        running.cancel()
        return server.calls

    assert asyncio.run(scenario())["watch"] <= 4


def test_an_object_leaves_no_trace_in_the_index() -> None:
    store = Store(lambda item: item["values"])
    store.put(("ns", "a"), {"values": ["x", "x", "y"]})
    store.put(("ns", "a"), {"values": ["y"]})
    store.pop(("ns", "a"))

    assert (store.indexed("x"), store.indexed("y"), store.all()) == ((), (), ())
