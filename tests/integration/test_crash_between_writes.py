"""Invariant 2 on a real API server: a crash of the operator at any of its writes comes to what no crash comes to."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import aiohttp
import pytest

from pretrain_operator.kubernetes.adapter import janitor
from pretrain_operator.kubernetes.client.api import CONFIG_MAPS, NETWORK_POLICIES, PODS, Api, ApiError, Object
from pretrain_operator.kubernetes.client.transport import Transport
from pretrain_operator.kubernetes.server.app import running_operator
from pretrain_operator.kubernetes.workload.names import UID_LABEL, owner_uid, worker_pod
from support.kubernetes.app import NAMESPACES, Town, a_town

Where = Literal["before", "after", "answer lost"]
AT_A_TIME = 3
UNCOUNTED = ("/leases", "/events")
"""The Lease is not what this is about; an Event follows the write of a status, whose crashes are counted."""


class Crash(OSError):
    """This operator does nothing more."""


class CrashingTransport(Transport):
    """Ends an operator at one of its writes: from then on it can write nothing."""

    def __init__(self, open_: Transport) -> None:
        self._open = open_
        self.writes = 0
        self.crashed = asyncio.Event()
        self._fatal: int | None = None
        self._where: Where = "before"

    def crash_at(self, write: int | None, where: Where) -> None:
        """Count from here on."""
        self.writes, self._fatal, self._where = 0, write, where

    async def request(
        self, method: str, path: str, headers: dict[str, str], body: Any, *, total: float | None, silence: float
    ) -> aiohttp.ClientResponse:
        counted = method != "GET" and not any(part in path for part in UNCOUNTED)
        self.writes += counted
        if self.crashed.is_set() and method != "GET" and "/leases" not in path:
            raise Crash
        fatal = counted and self.writes == self._fatal
        if fatal and self._where == "before":
            self.crashed.set()
            raise Crash
        answer = await self._open.request(method, path, headers, body, total=total, silence=silence)
        if fatal:
            self.crashed.set()
            if self._where == "answer lost":
                answer.close()
                raise Crash
        return answer

    async def close(self) -> None:
        await self._open.close()


@dataclass(frozen=True)
class Fixpoint:
    """All of a job that stays when nothing happens any more, less what differs from run to run: uids and times."""

    pods: tuple[tuple[int, int, str], ...]
    maps: int
    policies: int
    foreign: int
    status: dict[str, object]


async def fixpoint(town: Town, uid: str) -> Fixpoint:
    pods, maps, policies = [
        (await town.api.list(resource, town.namespace, label_selector=UID_LABEL))[0]
        for resource in (PODS, CONFIG_MAPS, NETWORK_POLICIES)
    ]
    return Fixpoint(
        pods=tuple(sorted(seen(pod) for pod in pods)),
        maps=len(maps),
        policies=len(policies),
        foreign=sum(owner_uid(child) != uid for child in (*pods, *maps, *policies)),
        status=await said(town),
    )


async def said(town: Town) -> dict[str, object]:
    try:
        status = await town.status()
    except ApiError:
        return {}
    return {
        "phase": status.phase,
        "reason": status.reason,
        "replicas": status.replicas,
        "workers": [(worker.slot, worker.attempt, worker.state) for worker in status.workers],
        "attempts": [(slot.slot, slot.attempt, slot.joined) for slot in status.bookkeeping.slots],
        "conditions": sorted((item.type, item.status) for item in status.conditions),
    }


def seen(pod: Object) -> tuple[int, int, str]:
    worker = worker_pod(pod)
    assert worker is not None
    return worker.slot, worker.attempt, pod["status"]["phase"]


@dataclass(frozen=True)
class Scenario:
    """What happens to a job that trains, or does not exist yet, and what that comes to."""

    name: str
    change: Callable[[Town], Awaitable[object]]
    phase: str
    pods: tuple[tuple[int, int, str], ...]


async def nothing(_: Town) -> None:
    pass


async def lose_a_pod(town: Town) -> None:
    lost = next(pod for pod in await town.pods() if seen(pod)[0] == 1)
    await town.kubelet.remove(lost["metadata"]["name"])


async def finish(town: Town) -> None:
    training = town.kubelet.training["gpt2"]
    training.total = training.step + 3


async def suspend(town: Town) -> None:
    await town.change({"suspend": True})


async def delete(town: Town) -> None:
    await town.delete_job()


def three(phase: str, *attempts: int) -> tuple[tuple[int, int, str], ...]:
    return tuple((slot, attempt, phase) for slot, attempt in enumerate(attempts))


ENDLESS = 1_000_000
CREATE = Scenario("create", nothing, "Training", three("Running", 0, 0, 0))
SCENARIOS = [
    CREATE,
    Scenario("recover", lose_a_pod, "Training", three("Running", 0, 1, 0)),
    Scenario("finish", finish, "Succeeded", three("Succeeded", 0, 0, 0)),
    Scenario("suspend", suspend, "Suspended", ()),
    Scenario("delete", delete, "", ()),
]


@dataclass
class Trial:
    """One run of a scenario in a namespace of its own."""

    api: Api
    kubeconfig: Path
    folder: Path

    async def __call__(
        self, scenario: Scenario, calm: Fixpoint | None = None, write: int | None = None, where: Where = "before"
    ) -> tuple[Fixpoint, int]:
        """What it came to, and after how many writes; with `calm`, once it came to that."""
        name, folder = f"crash-{uuid.uuid4().hex[:8]}", self.folder / uuid.uuid4().hex
        await self.api.create(NAMESPACES, None, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        folder.mkdir()
        async with a_town(self.api, name, self.kubeconfig, folder) as town:
            job = await town.submit(until=ENDLESS, total=ENDLESS)
            transport = CrashingTransport(await Transport.connect(self.kubeconfig))
            transport.crash_at(write if scenario is CREATE else None, where)
            async with running_operator(town.options, connect=lambda _: _given(transport)):
                if scenario is not CREATE:
                    await self._end(town, job, CREATE, None, transport)
                    transport.crash_at(write, where)
                    await scenario.change(town)
                end = await self._end(town, job, scenario, calm, transport)
            if end is None:
                async with running_operator(town.options):
                    end = await self._end(town, job, scenario, calm, None)
            assert end is not None
            return end, transport.writes

    async def _end(
        self, town: Town, job: Object, scenario: Scenario, calm: Fixpoint | None, transport: CrashingTransport | None
    ) -> Fixpoint | None:
        """What the job comes to rest at; None: the operator crashed before."""
        last: Fixpoint | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(60):
                while True:
                    before, last = last, await fixpoint(town, job["metadata"]["uid"])
                    if transport is not None and transport.crashed.is_set():
                        return None
                    if last == calm or (calm is None and before == last and is_end(scenario, last)):
                        return last
                    await asyncio.sleep(0.3 if calm is None else 0.05)
        return last


async def _given(transport: Transport) -> Transport:
    return transport


def is_end(scenario: Scenario, now: Fixpoint) -> bool:
    """It came to what it should, as far as that is said here; the rest must not change any more."""
    trains = all(state == "Training" for _, _, state in now.status.get("workers", ()))  # type: ignore[attr-defined]
    return (now.status.get("phase", ""), now.pods) == (scenario.phase, scenario.pods) and (
        trains or scenario.phase != "Training"
    )


@pytest.fixture
def trial(api: Api, apiserver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    monkeypatch.setattr(janitor, "ORPHAN_SECONDS", 0.0)  # there is no garbage collector here
    monkeypatch.setattr(janitor, "ROUND_SECONDS", 0.1)
    return Trial(api, apiserver, tmp_path)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
async def test_a_crash_at_any_write_comes_to_what_no_crash_comes_to(trial: Trial, scenario: Scenario) -> None:
    calm, writes = await trial(scenario)
    assert is_end(scenario, calm)
    at_a_time = asyncio.Semaphore(AT_A_TIME)

    async def crash(write: int, where: Where) -> tuple[int, Where, Fixpoint]:
        async with at_a_time:
            return write, where, (await trial(scenario, calm, write, where))[0]

    crashes = [crash(write, where) for write in range(1, writes + 1) for where in get_args(Where)]
    for write, where, shaken in await asyncio.gather(*crashes):
        assert shaken == calm, f"write {write} of {writes}, {where}"
