"""A replica that may act no longer must not write, whatever it was about to do when it was stopped for a while."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

from pretrain_operator.kubernetes.client.transport import Transport


class FencedTransport(Transport):
    """Refuses to send anything but reads unless `may_write`, which may take a while to say. Shares the connections of
    another transport."""

    def __init__(self, open_: Transport, may_write: Callable[[], Awaitable[bool]]) -> None:
        self._open = open_
        self._may_write = may_write

    async def request(
        self, method: str, path: str, headers: dict[str, str], body: Any, *, total: float | None, silence: float
    ) -> aiohttp.ClientResponse:
        """As Transport's. Raises OSError where writing is no longer allowed."""
        if method != "GET" and not await self._may_write():
            raise OSError("this replica is no longer the active one")
        return await self._open.request(method, path, headers, body, total=total, silence=silence)

    async def close(self) -> None:
        """Nothing: the connections are the other one's."""
