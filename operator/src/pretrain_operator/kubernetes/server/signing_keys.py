"""Public keys of the API server's service-account tokens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

from jwt import PyJWK
from jwt.exceptions import PyJWTError

ISSUER_PATH = "/.well-known/openid-configuration"
KEYS_PATH = "/openid/v1/jwks"
ALGORITHMS = ("RS256", "ES256")
"""Algorithms of API servers."""
PAUSE_SECONDS = 3.0
"""Least time between fetches, whatever unknown keys tokens name."""
STALE_SECONDS = 60.0
"""Age of the keys that triggers a fetch, so that removed keys are dropped."""
FETCH_SECONDS = 3.0
"""Time limit of a fetch; at most the pause, so that known keys never wait for unknown ones."""


@dataclass(frozen=True)
class Keys:
    """Published keys and their issuer."""

    issuer: str
    by_id: dict[str, PyJWK]


class KeyRing:
    """Cache of the keys. `read` returns the JSON at a path of the API server, or raises OSError."""

    def __init__(self, read: Callable[[str], Awaitable[Any]], clock: Callable[[], float]) -> None:
        self._read = read
        self._clock = clock
        self._keys = Keys("", {})
        self._failure: OSError | None = None
        self._fetched_at = self._tried_at = float("-inf")
        self._fetching = asyncio.Lock()

    async def find(self, key_id: str) -> tuple[PyJWK, str] | None:
        """Return the key of this id and its issuer; None: no such key. Raises OSError while that is unknown."""
        fetch_under_way = key_id not in self._keys.by_id and self._fetching.locked()
        if self._due(key_id) or fetch_under_way:
            async with self._fetching:
                if self._due(key_id):
                    await self._fetch()
        keys = self._keys
        if key_id in keys.by_id:
            return keys.by_id[key_id], keys.issuer
        if self._failure is not None:
            raise self._failure
        return None

    def _due(self, key_id: str) -> bool:
        now = self._clock()
        if 0 <= now - self._tried_at < PAUSE_SECONDS:
            return False
        return key_id not in self._keys.by_id or now - self._fetched_at >= STALE_SECONDS

    async def _fetch(self) -> None:
        self._tried_at = self._clock()
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                discovery, key_set = await asyncio.gather(self._read(ISSUER_PATH), self._read(KEYS_PATH))
            self._keys = Keys(str(discovery["issuer"]), usable(key_set["keys"]))
        except OSError as error:  # TimeoutError is one
            self._failure = error
        except (KeyError, TypeError) as error:
            self._failure = OSError(f"the API server's {ISSUER_PATH} or {KEYS_PATH} is malformed: {error!r}")
        else:
            self._failure, self._fetched_at = None, self._tried_at


def usable(published: list[dict[str, Any]]) -> dict[str, PyJWK]:
    """Return the keys that may sign a service-account token, by id."""
    keys: dict[str, PyJWK] = {}
    for data in published:
        with contextlib.suppress(PyJWTError):  # unsupported key type
            key = PyJWK.from_dict(data)
            key_id = cast(object, key.key_id)
            if key.algorithm_name in ALGORITHMS and isinstance(key_id, str):
                keys[key_id] = key
    return keys
