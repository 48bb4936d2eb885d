"""Human-readable quantities: durations (`90s`, `1h30m`) and token counts (`10B`)."""

from __future__ import annotations

import re
from datetime import timedelta
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, WithJsonSchema

DURATION_PATTERN = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h|d))+$"
TOKENS_PATTERN = r"^[0-9]+(\.[0-9]+)?[KMBT]?$"
MAX_LENGTH = 32
"""Maximum characters of a quantity: bounds the cost of validation."""
MAX_DURATION = timedelta(days=3650)
MAX_TOKENS = 10**18
MAX_STEPS = 10**9
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")
_UNIT_MILLISECONDS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_TOKEN_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_duration(value: Any) -> timedelta:
    """Parse a duration, `1h30m`, to whole milliseconds. Raises ValueError with the allowed form."""
    if isinstance(value, timedelta):
        return value
    if not isinstance(value, str) or len(value) > MAX_LENGTH or not re.fullmatch(DURATION_PATTERN, value, re.ASCII):
        raise ValueError(f"expected a duration such as 90s, 10m or 1h30m (units ms, s, m, h, d), not {value!r}")
    milliseconds = round(sum(Decimal(n) * _UNIT_MILLISECONDS[unit] for n, unit in _DURATION_PART.findall(value)))
    if milliseconds > MAX_DURATION / timedelta(milliseconds=1):
        raise ValueError(f"expected a duration of at most {format_duration(MAX_DURATION)}, not {value!r}")
    return timedelta(milliseconds=milliseconds)


def format_duration(value: timedelta) -> str:
    """Format a duration in the shortest form that `parse_duration` accepts: `90s` -> `1m30s`."""
    milliseconds = round(value / timedelta(milliseconds=1))
    text = ""
    for unit in ("d", "h", "m", "s", "ms"):
        count, milliseconds = divmod(milliseconds, _UNIT_MILLISECONDS[unit])
        text += f"{count}{unit}" if count else ""
    return text or "0s"


def parse_tokens(value: Any) -> int:
    """Parse a token count: `10B` -> 10_000_000_000. Raises ValueError with the allowed form."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():  # YAML parses 1e9 as a float
        return int(value)
    if not isinstance(value, str) or len(value) > MAX_LENGTH or not re.fullmatch(TOKENS_PATTERN, value, re.ASCII):
        raise ValueError(f"expected a number of tokens such as 500M or 10B (K, M, B, T), not {value!r}")
    factor = _TOKEN_FACTORS[value[-1] if value[-1] in "KMBT" else ""]
    return round(Decimal(value.rstrip("KMBT")) * factor)


def _positive(value: timedelta) -> timedelta:
    if value <= timedelta(0):
        raise ValueError("expected a duration greater than 0s")
    return value


_DURATION_SCHEMA = {"type": "string", "pattern": DURATION_PATTERN, "maxLength": MAX_LENGTH}

Duration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, return_type=str),
    WithJsonSchema(_DURATION_SCHEMA),
]
PositiveDuration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    AfterValidator(_positive),
    PlainSerializer(format_duration, return_type=str),
    WithJsonSchema(
        _DURATION_SCHEMA
        | {"x-kubernetes-validations": [{"rule": "self.matches('[1-9]')", "message": "must be greater than 0s"}]}
    ),
]
TokenCount = Annotated[
    int,
    BeforeValidator(parse_tokens),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "pattern": TOKENS_PATTERN,
            "maxLength": MAX_LENGTH,
            "x-kubernetes-validations": [
                {
                    "rule": "type(self) == int ? self >= 1 : string(self).matches('[1-9]')",
                    "message": "must be at least 1",
                }
            ],
        }
    ),
]
