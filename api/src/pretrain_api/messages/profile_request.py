"""Request to profile a running job: `steps=5,rank=0,id=abc`, as an annotation or a file of a local run."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import NamedTuple

ANNOTATION = "pretrain.dev/profile"
DEFAULT_STEPS, MAX_STEPS = 5, 20
"""More steps add no insight, and traces grow with them."""
MAX_RANK = 10**6
_ID = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_.]{0,62}")
_FORM = "write steps=N,rank=R,id=TEXT; each part is optional"


class InvalidProfile(ValueError):
    """Invalid request; the message says what is allowed."""


@dataclass(frozen=True)
class ProfileRequest:
    """Request to record `steps` steps of global rank `rank`. The id identifies the request."""

    id: str
    steps: int = DEFAULT_STEPS
    rank: int = 0

    @property
    def text(self) -> str:
        """Text that `parse_request` parses."""
        return f"steps={self.steps},rank={self.rank},id={self.id}"


@dataclass(frozen=True)
class InvalidRequest:
    """Request that cannot be parsed; the answer carries the message."""

    id: str
    message: str


class _Bounds(NamedTuple):
    least: int
    most: int


_NUMBERS = {"steps": _Bounds(1, MAX_STEPS), "rank": _Bounds(0, MAX_RANK)}


def parse_request(text: str) -> ProfileRequest:
    """Parse a request; the default id is derived from its numbers. Raises InvalidProfile."""
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
            raise InvalidProfile(
                f"id {value!r}: use up to 63 letters, digits, '-', '_' and '.', starting with a letter or digit"
            )
        else:
            raise InvalidProfile(f"unknown part {part!r}: {_FORM}")
    return ProfileRequest(name or f"steps-{numbers['steps']}-rank-{numbers['rank']}", **numbers)


def read_request(text: str) -> ProfileRequest | InvalidRequest | None:
    """Parse an annotation or a file; None: empty text."""
    if not text.strip():
        return None
    try:
        return parse_request(text)
    except InvalidProfile as error:
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return InvalidRequest(f"invalid-{digest}", f"{text.strip()[:200]!r} is not a valid profile request: {error}")


def _number(field: str, value: str) -> int:
    bounds = _NUMBERS[field]
    if not re.fullmatch(r"[0-9]{1,9}", value) or not bounds.least <= int(value) <= bounds.most:
        raise InvalidProfile(f"{field} must be a whole number from {bounds.least} to {bounds.most}, not {value!r}")
    return int(value)
