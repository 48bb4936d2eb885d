"""Where ranks look for each other."""

from __future__ import annotations

import asyncio
import socket

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from pretrain_agent.network.addresses import ServiceResolver, interface_of, rank_environment
from pretrain_agent.network.metrics_server import http_address


def test_ranks_use_the_network_at_which_their_worker_is_reached() -> None:
    assert rank_environment("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo"}


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "a-name", ""])
def test_what_is_no_address_of_this_machine_is_left_to_gloo(host: str) -> None:
    assert interface_of(host) is None
    assert rank_environment(host) == {}


@pytest.mark.parametrize(("host", "address"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("10.1.2.3", None)])
def test_metrics_are_served_everywhere_unless_the_worker_is_this_machines_own_business(
    host: str, address: str | None
) -> None:
    assert http_address(host) == address


class NameServer(AbstractResolver):
    """Says what it is told to, or nothing."""

    def __init__(self) -> None:
        self.address: str | None = None
        self.error: OSError | None = None

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if self.error is not None:
            raise self.error
        if self.address is None:
            await asyncio.Event().wait()
        address = self.address or ""
        return [ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=0)]

    async def close(self) -> None:
        pass


async def test_a_service_is_looked_for_at_its_newest_address() -> None:
    server = NameServer()
    resolver = ServiceResolver(server)
    for server.address in ("10.0.0.1", "10.0.0.2"):
        assert [found["host"] for found in await resolver.resolve("agents", 8443)] == [server.address]


@pytest.mark.parametrize("error", [OSError("no name server"), None], ids=["it fails", "it hangs"])
async def test_a_service_stays_where_it_was_while_names_cannot_be_looked_up(error: OSError | None) -> None:
    server = NameServer()
    resolver = ServiceResolver(server)
    server.address = "10.0.0.1"
    await resolver.resolve("agents", 8443)

    server.address, server.error = None, error

    assert [found["host"] for found in await resolver.resolve("agents", 8443)] == ["10.0.0.1"]


async def test_a_service_that_was_never_known_is_an_error() -> None:
    server = NameServer()
    server.error = OSError("no such name")
    with pytest.raises(OSError, match="no such name"):
        await ServiceResolver(server).resolve("agents", 8443)
