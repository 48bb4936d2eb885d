"""Who calls: what is known of an agent before it says anything."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from aiohttp import web

from pretrain_api.messages.protocol import Hello


@dataclass(frozen=True)
class Caller:
    """The worker that a connection belongs to. None: whichever it says it is."""

    slot: int | None
    attempt: int | None

    def may_say(self, hello: Hello) -> bool:
        """Whether the hello is this worker's."""
        return self.slot in (None, hello.slot) and self.attempt in (None, hello.attempt)


@dataclass(frozen=True)
class Refusal:
    """Why a connection is not taken. The caller reads the message: nothing in it may help to guess better."""

    status: Literal[401, 403, 503]
    message: str


Authenticate = Callable[[web.Request, str], Awaitable[Caller | Refusal]]
"""(request, uid of the job that is asked for) -> whose connection it is."""


async def anybody(request: web.Request, job_uid: str) -> Caller | Refusal:
    """Every caller is believed: for an address that none but our own processes reach."""
    return Caller(None, None)
