"""Addresses: at which ranks reach each other, on the network where their workers do; and where the coordinator is."""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import socket
import struct

from aiohttp.abc import AbstractResolver, ResolveResult

RESOLVE_SECONDS = 1.0
"""A name server may be on the machine that is gone as well."""

_SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface."""


def rank_environment(host: str) -> dict[str, str]:
    """Variables that the ranks of a worker at this address should have where nothing else was said."""
    # gloo takes the address of the machine's name otherwise, which in a pod on its node's network can be that of the
    # loopback: then ranks wait for each other for minutes, or fail.
    interface = interface_of(host)
    return {"GLOO_SOCKET_IFNAME": interface} if interface else {}


def interface_of(host: str) -> str | None:
    """The network interface with this IPv4 address; None: there is none, or it is no such address."""
    try:
        wanted = ipaddress.IPv4Address(host).packed
    except ValueError:
        return None
    return next((name for _, name in socket.if_nameindex() if _address(name) == wanted), None)


class ServiceResolver(AbstractResolver):
    """The addresses of a name; the last ones that were known when it cannot be looked up in RESOLVE_SECONDS."""

    def __init__(self, resolver: AbstractResolver) -> None:
        self._resolver = resolver
        self._known: dict[tuple[str, int], list[ResolveResult]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """As AbstractResolver's. Raises OSError, TimeoutError included, for a name that was never known."""
        try:
            async with asyncio.timeout(RESOLVE_SECONDS if (host, port) in self._known else None):
                self._known[host, port] = await self._resolver.resolve(host, port, family)
        except OSError:
            if (host, port) not in self._known:
                raise
        return self._known[host, port]

    async def close(self) -> None:
        """Release the other resolver."""
        await self._resolver.close()


def _address(interface: str) -> bytes | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None  # It has none.
    return answer[20:24]
