"""Network interface of the ranks and name resolution of the coordinator."""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import socket
import struct

from aiohttp.abc import AbstractResolver, ResolveResult

RESOLVE_SECONDS = 1.0
"""Timeout of a look-up: the name server may be on the lost machine too."""

_SIOCGIFADDR = 0x8915
"""Linux ioctl for the IPv4 address of an interface."""


def rank_environment(host: str) -> dict[str, str]:
    """Return default environment variables for the ranks of a worker with this address."""
    # By default gloo binds to the address of the hostname. In a pod on the host network that can be the loopback
    # address, and then ranks wait for each other for minutes, or fail.
    interface = interface_of(host)
    return {"GLOO_SOCKET_IFNAME": interface} if interface else {}


def interface_of(host: str) -> str | None:
    """Return the network interface with this IPv4 address; None: no interface has it, or it is no IPv4 address."""
    try:
        wanted = ipaddress.IPv4Address(host).packed
    except ValueError:
        return None
    return next((name for _, name in socket.if_nameindex() if _address(name) == wanted), None)


class ServiceResolver(AbstractResolver):
    """Resolver that falls back to the last known addresses when a look-up takes longer than RESOLVE_SECONDS."""

    def __init__(self, resolver: AbstractResolver) -> None:
        self._resolver = resolver
        self._known: dict[tuple[str, int], list[ResolveResult]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Resolve as AbstractResolver does. Raises OSError (or TimeoutError) for a name that was never resolved."""
        try:
            async with asyncio.timeout(RESOLVE_SECONDS if (host, port) in self._known else None):
                self._known[host, port] = await self._resolver.resolve(host, port, family)
        except OSError:
            if (host, port) not in self._known:
                raise
        return self._known[host, port]

    async def close(self) -> None:
        """Close the wrapped resolver."""
        await self._resolver.close()


def _address(interface: str) -> bytes | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None  # The interface has no address.
    return answer[20:24]
