"""Quantities of Kubernetes, such as `8Gi` or `1e9`, parsed by form: no number is computed before its size is known."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal

MAX_LENGTH = 64
MAX_EXPONENT = 18
MAX_QUANTITY = 2**63 - 1
"""Kubernetes stores larger quantities as this one."""
_FORM = re.compile(
    r"(?P<number>[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+))((?P<suffix>[KMGTPE]i|[numkMGTPE]?)|[eE](?P<exponent>[+-]?[0-9]{1,10}))"
)
_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}


def parse_quantity(value: object) -> int:
    """Parse a quantity to a whole number, rounded up. Raises ValueError with the allowed form."""
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    match = _FORM.fullmatch(text) if isinstance(text, str) and len(text) <= MAX_LENGTH else None
    if match is None:
        raise ValueError("expected a quantity such as 8Gi, 500M or 1e9")
    exponent = int(match["exponent"] or 0)
    if abs(exponent) > MAX_EXPONENT:
        raise ValueError(f"expected an exponent from -{MAX_EXPONENT} to {MAX_EXPONENT}")
    suffix = match["suffix"] or ""
    number = Decimal(match["number"])
    number = number * 2 ** _BINARY[suffix] if suffix in _BINARY else number.scaleb(exponent + _DECIMAL[suffix])
    if not abs(number) <= MAX_QUANTITY:
        raise ValueError(f"expected a quantity of at most {MAX_QUANTITY}")
    return int(number.to_integral_value(ROUND_CEILING))
