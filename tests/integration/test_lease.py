"""The Lease against a real API server, in real time. What clocks and crashes can do is simulated in the unit tests."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from pretrain_operator.kubernetes.client.api import CONFIG_MAPS, LEASES, Api, ApiError
from pretrain_operator.kubernetes.leader.lease import DURATION_SECONDS, UNANSWERED, Lease, LeaseLost
from support.kubernetes.api_proxy import Answer, ApiProxy, Call, Cut, Hang
from support.kubernetes.api_server import ApiServer, connected


def a_write(call: Call) -> bool:
    return call.write


async def acquired(lease: Lease, seconds: float = 30) -> int:
    async with asyncio.timeout(seconds):
        return await lease.acquire()


async def test_the_lease_says_who_holds_it_as_kubernetes_does(server: ApiServer, api: Api, namespace: str) -> None:
    lease = Lease(api, namespace, "operator", "pod-a", duration=8)

    epoch = await acquired(lease)

    assert lease.held
    spec = (await api.get(LEASES, namespace, "operator"))["spec"]
    assert (spec["holderIdentity"], spec["leaseDurationSeconds"], spec["leaseTransitions"]) == ("pod-a", 8, epoch - 1)
    assert "pod-a" in server.kubectl("-n", namespace, "get", "lease", "operator")


async def test_who_waits_takes_over_at_once_when_the_lease_is_let_go(api: Api, namespace: str) -> None:
    first, second = (Lease(api, namespace, "operator", name) for name in "ab")
    epoch = await acquired(first)
    holding = asyncio.create_task(first.hold())
    waiting = asyncio.create_task(acquired(second))
    await asyncio.wait((waiting,), timeout=2.5)
    assert not waiting.done()

    holding.cancel()
    await first.release()

    assert not first.held
    assert await asyncio.wait_for(waiting, 2) == epoch + 1


async def test_who_is_cut_off_stops_before_another_takes_over(
    api: Api, proxied: Api, proxy: ApiProxy, namespace: str
) -> None:
    first, second = Lease(proxied, namespace, "operator", "a"), Lease(api, namespace, "operator", "b")
    await acquired(first)
    holding = asyncio.create_task(first.hold())
    waiting = asyncio.create_task(acquired(second))
    await proxy.heard(a_write, 3)
    proxy.plan(Hang(), lambda call: True, times=1000)

    await asyncio.wait((holding, waiting), return_when=asyncio.FIRST_COMPLETED)

    assert isinstance(holding.exception(), LeaseLost)
    assert not first.held
    assert not waiting.done()
    await waiting
    assert second.held


async def mute(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
    """Takes connections, says nothing: a process that is stopped."""
    await asyncio.Event().wait()


@pytest.mark.parametrize("stopped", [False, True], ids=["gone", "stopped"])
async def test_who_does_not_answer_is_followed_before_the_lease_runs_out(
    api: Api, namespace: str, stopped: bool
) -> None:
    port = 1
    if stopped:
        port = (await asyncio.start_server(mute, "127.0.0.1", 0)).sockets[0].getsockname()[1]
    first = Lease(api, namespace, "operator", "a", address=f"127.0.0.1:{port}")
    second = Lease(api, namespace, "operator", "b")
    epoch = await acquired(first)
    acquired_at = asyncio.get_running_loop().time()

    assert await acquired(second) == epoch + 1

    assert not first.held
    assert asyncio.get_running_loop().time() - acquired_at >= UNANSWERED * DURATION_SECONDS
    with pytest.raises(LeaseLost, match="held by b"):
        await first.hold()
    assert not await first.surely_held()


async def test_who_answers_keeps_the_lease_for_its_whole_duration(api: Api, namespace: str) -> None:
    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.0 500 \r\n\r\n")
        writer.close()

    server = await asyncio.start_server(say, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    await acquired(Lease(api, namespace, "operator", "a", address=f"127.0.0.1:{port}"))
    began = asyncio.get_running_loop().time()

    await acquired(Lease(api, namespace, "operator", "b"))

    assert asyncio.get_running_loop().time() - began >= 0.9 * DURATION_SECONDS
    server.close()


async def test_who_cannot_renew_waits_with_what_it_writes(proxied: Api, proxy: ApiProxy, namespace: str) -> None:
    lease = Lease(proxied, namespace, "operator", "a")
    await acquired(lease)
    proxy.plan(Cut(), lambda call: True, times=1000)
    holding = asyncio.create_task(lease.hold())
    async with asyncio.timeout(30):
        while lease.held:
            await asyncio.sleep(0.05)
    sure = asyncio.create_task(lease.surely_held())
    await asyncio.wait((sure,), timeout=0.5)
    assert not sure.done()
    assert not holding.done()

    proxy.heal()

    assert await asyncio.wait_for(sure, 30)
    holding.cancel()


@pytest.mark.parametrize("fault", [Cut("answer lost"), Answer(429, retry_after=1)], ids=str)
async def test_a_renewal_that_fails_once_is_tried_again(
    proxied: Api, proxy: ApiProxy, namespace: str, fault: Answer | Cut
) -> None:
    lease = Lease(proxied, namespace, "operator", "a", duration=8)
    await acquired(lease)
    proxy.plan(fault, a_write)
    holding = asyncio.create_task(lease.hold())

    await asyncio.wait_for(proxy.heard(a_write, 4), 30)

    assert not holding.done()
    assert lease.held
    holding.cancel()


async def test_a_lease_that_another_took_is_lost_at_the_next_renewal(api: Api, namespace: str) -> None:
    lease = Lease(api, namespace, "operator", "a")
    await acquired(lease)
    holding = asyncio.create_task(lease.hold())
    await api.merge_patch(LEASES, namespace, "operator", {"spec": {"holderIdentity": "b"}})

    with pytest.raises(LeaseLost, match="held by b"):
        await asyncio.wait_for(holding, 10)

    assert not lease.held


async def test_of_many_who_want_it_one_gets_it(api: Api, namespace: str) -> None:
    leases = [Lease(api, namespace, "operator", f"pod-{number}") for number in range(8)]

    waiting = [asyncio.create_task(lease.acquire()) for lease in leases]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.wait(waiting, timeout=1)

    assert sum(lease.held for lease in leases) == 1
    for task in waiting:
        task.cancel()


async def test_a_lease_is_renewed_while_work_fills_all_calls(proxy: ApiProxy, namespace: str) -> None:
    async with connected(proxy.kubeconfig, concurrency=2) as api, contextlib.AsyncExitStack() as stack:
        lease = Lease(api, namespace, "operator", "a", duration=8)
        await acquired(lease)
        proxy.plan(Hang(), lambda call: "configmaps" in call.path, times=10)
        work = [asyncio.create_task(api.list(CONFIG_MAPS, namespace)) for _ in range(10)]
        holding = asyncio.create_task(lease.hold())
        for task in (*work, holding):
            stack.callback(task.cancel)

        await asyncio.wait_for(proxy.heard(a_write, 4), 30)

        assert not holding.done()
        assert lease.held


async def test_without_the_right_to_it_one_waits_until_it_is_given(
    server: ApiServer, namespace: str, tmp_path: Path
) -> None:
    kubeconfig = server.service_account(namespace, "operator", tmp_path)
    async with connected(kubeconfig) as powerless:
        with pytest.raises(ApiError, match="cannot get resource"):
            await powerless.get(LEASES, namespace, "operator")
        waiting = asyncio.create_task(acquired(Lease(powerless, namespace, "operator", "a")))
        server.kubectl("-n", namespace, "create", "role", "leases", "--verb=get,create,update", "--resource=leases")
        server.kubectl(
            "-n", namespace, "create", "rolebinding", "leases", "--role=leases",
            f"--serviceaccount={namespace}:operator",
        )  # fmt: skip

        assert await waiting > 1
