"""Typed transport to the API server: address, TLS and credentials come from the client library."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol, cast

import aiohttp
from kubernetes.aio import client as library
from kubernetes.aio import config as configurations

USER_AGENT = "pretrain-operator"
CONNECT_SECONDS = 5.0


class _Response(Protocol):
    response: aiohttp.ClientResponse


class _Rest(Protocol):
    async def request(
        self, method: str, url: str, headers: dict[str, str], body: Any, *, _request_timeout: aiohttp.ClientTimeout
    ) -> _Response: ...


class _Client(Protocol):
    """The part of the client library's untyped `ApiClient` in use."""

    rest_client: _Rest

    async def update_params_for_auth(
        self, headers: dict[str, str], queries: object, auth_settings: list[str], *rest: object
    ) -> None: ...

    async def close(self) -> None: ...


async def configured(kubeconfig: str | os.PathLike[str] | None) -> Any:
    """Return the client library's `Configuration` for the cluster of the kubeconfig; without one: for the cluster
    around this pod, else for the one of KUBECONFIG or ~/.kube/config."""
    load = cast(Any, configurations)
    configuration = cast(Any, library.Configuration())
    if kubeconfig is None and os.environ.get("KUBERNETES_SERVICE_HOST"):
        load.load_incluster_config(configuration)
    else:
        path = kubeconfig or os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config"
        await load.load_kube_config(str(path), client_configuration=configuration)
    return configuration


class Transport:
    """Authenticated HTTP to one API server. Rotated service-account tokens are reloaded."""

    def __init__(self, client: _Client, host: str) -> None:
        self._client = client
        self._host = host

    @classmethod
    async def connect(cls, kubeconfig: str | os.PathLike[str] | None) -> Transport:
        """Open a transport to the cluster that `configured` finds. Sends nothing yet."""
        configuration = await configured(kubeconfig)
        configuration.connection_pool_maxsize = 0  # each watch takes a connection; callers bound the rest
        return cls(cast(_Client, library.ApiClient(configuration)), configuration.host)

    async def request(
        self, method: str, path: str, headers: dict[str, str], body: Any, *, total: float | None, silence: float
    ) -> aiohttp.ClientResponse:
        """Send a request and return the answer's head, with the body unread. `total` limits the seconds of the whole
        exchange, `silence` those of each read. Raises aiohttp.ClientError, OSError or TimeoutError."""
        headers = {"User-Agent": USER_AGENT, "Accept": "application/json, */*", **headers}
        await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        limits = aiohttp.ClientTimeout(total=total, sock_connect=CONNECT_SECONDS, sock_read=silence)
        answer = await self._client.rest_client.request(
            method, self._host + path, headers, body, _request_timeout=limits
        )
        return answer.response

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()


class FencedTransport(Transport):
    """Sends reads always, and writes only if `may_write` returns True. Shares the connections of another transport."""

    def __init__(self, open_: Transport, may_write: Callable[[], Awaitable[bool]]) -> None:
        self._open = open_
        self._may_write = may_write

    async def request(
        self, method: str, path: str, headers: dict[str, str], body: Any, *, total: float | None, silence: float
    ) -> aiohttp.ClientResponse:
        """Send like Transport. Raises OSError for a write that is no longer allowed."""
        if method != "GET" and not await self._may_write():
            raise OSError("this replica no longer holds the lease")
        return await self._open.request(method, path, headers, body, total=total, silence=silence)

    async def close(self) -> None:
        """Do nothing: the other transport owns the connections."""
