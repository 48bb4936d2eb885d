"""Authentication of agents: which worker a connection belongs to, before its hello."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from aiohttp import web

from pretrain_api.messages.protocol import Hello


@dataclass(frozen=True)
class Caller:
    """The authenticated worker; None accepts the value that the hello states."""

    slot: int | None
    attempt: int | None

    @property
    def pod(self) -> tuple[int, int] | None:
        """(slot, attempt); None: unknown."""
        return None if self.slot is None or self.attempt is None else (self.slot, self.attempt)

    def may_say(self, hello: Hello) -> bool:
        """Return whether the hello is from this worker."""
        return self.slot in (None, hello.slot) and self.attempt in (None, hello.attempt)


@dataclass(frozen=True)
class AuthenticationFailure:
    """A rejected connection. The caller reads the message: it contains nothing that helps to guess a credential."""

    status: Literal[401, 403, 503]
    message: str


Authenticate = Callable[[web.Request, str], Awaitable[Caller | AuthenticationFailure]]
"""Authenticates (request, uid of the requested job)."""


async def anybody(request: web.Request, job_uid: str) -> Caller | AuthenticationFailure:
    """Accept every caller: for an address that only this machine's own processes reach."""
    return Caller(None, None)
