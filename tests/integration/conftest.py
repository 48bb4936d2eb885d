from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from pretrain_operator.kubernetes.client.api import Api, Resource
from support.kubernetes.api_proxy import ApiProxy, api_proxy
from support.kubernetes.api_server import ApiServer, connected, started_api_server

NAMESPACES = Resource("", "v1", "namespaces")


@pytest.fixture(scope="session")
def server() -> Iterator[ApiServer]:
    """An API server with our CustomResourceDefinition; everybody's, so stay in a namespace of your own."""
    with started_api_server() as server:
        yield server


@pytest.fixture(scope="session")
def apiserver(server: ApiServer) -> Path:
    """The kubeconfig of its administrator."""
    return server.kubeconfig


@pytest.fixture
async def api(apiserver: Path) -> AsyncIterator[Api]:
    """An administrator's client in the test's own event loop."""
    async with connected(apiserver) as api:
        yield api


@pytest.fixture
async def namespace(api: Api) -> str:
    """A namespace of the test's own."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
    await api.create(NAMESPACES, None, body)
    return name


@pytest.fixture
async def proxy(apiserver: Path, tmp_path: Path) -> AsyncIterator[ApiProxy]:
    """A proxy in front of the API server, to break things in."""
    async with api_proxy(apiserver, tmp_path) as proxy:
        yield proxy


@pytest.fixture
async def proxied(proxy: ApiProxy) -> AsyncIterator[Api]:
    """An administrator's client that goes through the proxy."""
    async with connected(proxy.kubeconfig) as api:
        yield api
