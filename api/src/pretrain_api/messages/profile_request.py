"""A request for a profile of a running job: `steps=5,rank=0,id=abc`, as an annotation or a file of a local run."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import NamedTuple

ANNOTATION = "pretrain.dev/profile"
DEFAULT_STEPS, MAX_STEPS = 5, 20
"""More steps say nothing more, and traces grow with them."""
MAX_RANK = 10**6
_ID = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_.]{0,62}")
_FORM = "write steps=N,rank=R,id=TEXT, each of which may be left out"


class InvalidProfile(ValueError):
    """A request that can't be; the message says what is allowed."""


@dataclass(frozen=True)
class ProfileRequest:
    """`steps` steps of global rank `rank`. A request with another id is another request."""

    id: str
    steps: int = DEFAULT_STEPS
    rank: int = 0

    @property
    def text(self) -> str:
        """As `parse_request` reads it."""
        return f"steps={self.steps},rank={self.rank},id={self.id}"


@dataclass(frozen=True)
class InvalidRequest:
    """Somebody asked for a profile in a way that is not understood: answered with why."""

    id: str
    message: str


class _Bounds(NamedTuple):
    least: int
    most: int


_NUMBERS = {"steps": _Bounds(1, MAX_STEPS), "rank": _Bounds(0, MAX_RANK)}


def parse_request(text: str) -> ProfileRequest:
    """The request that a text is; without an id the text itself tells it from others. Raises InvalidProfile."""
    numbers = {"steps": DEFAULT_STEPS, "rank": 0}
    name = ""
    for part in filter(None, (part.strip() for part in text.split(","))):
        field, found, value = part.partition("=")
        field, value = field.strip(), value.strip()
        if field == "id" and _ID.fullmatch(value):
            name = value
        elif field in _NUMBERS and found:
            numbers[field] = _number(field, value)
        elif field == "id":
            raise InvalidProfile(f"id {value!r}: up to 63 letters, digits, '-', '_' and '.', the first no sign")
        else:
            raise InvalidProfile(f"{part!r} is not known: {_FORM}")
    return ProfileRequest(name or f"steps-{numbers['steps']}-rank-{numbers['rank']}", **numbers)


def read_request(text: str) -> ProfileRequest | InvalidRequest | None:
    """What an annotation or a file asks for; an empty text for nothing."""
    if not text.strip():
        return None
    try:
        return parse_request(text)
    except InvalidProfile as error:
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return InvalidRequest(f"invalid-{digest}", f"{text.strip()[:200]!r} is no request for a profile: {error}")


def _number(field: str, value: str) -> int:
    bounds = _NUMBERS[field]
    if not re.fullmatch(r"[0-9]{1,9}", value) or not bounds.least <= int(value) <= bounds.most:
        raise InvalidProfile(f"{field} must be a whole number from {bounds.least} to {bounds.most}, not {value!r}")
    return int(value)
