"""How requests reach the API server: where it is, whom to trust, who we are. The client library's business, typed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol, cast

import aiohttp
from kubernetes.aio import client as library
from kubernetes.aio import config as configurations

USER_AGENT = "pretrain-operator"
CONNECT_SECONDS = 5.0


class _Answer(Protocol):
    response: aiohttp.ClientResponse


class _Rest(Protocol):
    async def request(
        self, method: str, url: str, headers: dict[str, str], body: Any, *, _request_timeout: aiohttp.ClientTimeout
    ) -> _Answer: ...


class _Client(Protocol):
    """What is used of the client library's `ApiClient`, which has no types."""

    rest_client: _Rest

    async def update_params_for_auth(
        self, headers: dict[str, str], queries: object, auth_settings: list[str], *rest: object
    ) -> None: ...

    async def close(self) -> None: ...


async def configured(kubeconfig: str | os.PathLike[str] | None) -> Any:
    """Address and credentials, in the client library's `Configuration`: of the cluster that the kubeconfig names;
    without one, of the cluster that this pod runs in, else of the one that KUBECONFIG or ~/.kube/config names."""
    load = cast(Any, configurations)
    configuration = cast(Any, library.Configuration())
    if kubeconfig is None and os.environ.get("KUBERNETES_SERVICE_HOST"):
        load.load_incluster_config(configuration)
    else:
        path = kubeconfig or os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config"
        await load.load_kube_config(str(path), client_configuration=configuration)
    return configuration


class Transport:
    """Authenticated HTTP to one API server. A service account's token is read again as it is rotated."""

    def __init__(self, client: _Client, host: str) -> None:
        self._client = client
        self._host = host

    @classmethod
    async def connect(cls, kubeconfig: str | os.PathLike[str] | None) -> Transport:
        """To the cluster that `configured` finds. Nothing is sent yet."""
        configuration = await configured(kubeconfig)
        configuration.connection_pool_maxsize = 0  # watches take a connection each; calls are bounded by who makes them
        return cls(cast(_Client, library.ApiClient(configuration)), configuration.host)

    async def request(
        self, method: str, path: str, headers: dict[str, str], body: Any, *, total: float | None, silence: float
    ) -> aiohttp.ClientResponse:
        """The answer's head; its body is still to be read. `total` and `silence` bound the seconds of the whole and
        of each wait for more of it. Raises aiohttp.ClientError, OSError or TimeoutError."""
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
