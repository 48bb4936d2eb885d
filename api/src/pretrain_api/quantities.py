"""Quantities as people write them: durations (`90s`, `1h30m`) and token counts (`10B`)."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

DURATION_PATTERN = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h|d))+$"
TOKENS_PATTERN = r"^[0-9]+(\.[0-9]+)?[KMBT]?$"
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TOKEN_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_duration(value: Any) -> timedelta:
    """`1h30m` -> timedelta. Raises ValueError that says what is allowed."""
    if isinstance(value, timedelta):
        return value
    if not isinstance(value, str) or not re.fullmatch(DURATION_PATTERN, value):
        raise ValueError(f"a duration such as 90s, 10m or 1h30m (units ms, s, m, h, d) is wanted, not {value!r}")
    return timedelta(seconds=sum(float(n) * _UNIT_SECONDS[unit] for n, unit in _DURATION_PART.findall(value)))


def format_duration(value: timedelta) -> str:
    """The shortest text that `parse_duration` reads back: `90s` -> `1m30s`."""
    milliseconds = round(value.total_seconds() * 1000)
    text = ""
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, milliseconds = divmod(milliseconds, size)
        text += f"{count}{unit}" if count else ""
    return text or "0s"


def parse_tokens(value: Any) -> int:
    """`10B` -> 10_000_000_000. Raises ValueError that says what is allowed."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str) or not re.fullmatch(TOKENS_PATTERN, value):
        raise ValueError(f"a number of tokens such as 500M or 10B (K, M, B, T) is wanted, not {value!r}")
    factor = _TOKEN_FACTORS[value[-1] if value[-1] in "KMBT" else ""]
    return round(float(value.rstrip("KMBT")) * factor)


Duration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, return_type=str),
    WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN}),
]
TokenCount = Annotated[
    int,
    BeforeValidator(parse_tokens),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": TOKENS_PATTERN}]}),
]
