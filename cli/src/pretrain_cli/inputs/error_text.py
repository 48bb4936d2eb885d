"""Plain-language messages for pydantic's validation errors."""

from __future__ import annotations

import difflib
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic_core import ErrorDetails

from pretrain_api.base import Frozen
from pretrain_api.spec.job import PretrainJob

_EXPECTED = {
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "int_parsing_size": "expected a smaller whole number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "string_type": "expected a string (put quotes around it)",
    "tuple_type": "expected a list",
    "dict_type": "expected a mapping (`key: value` lines)",
    "model_type": "expected a mapping (`key: value` lines)",
}
_BOUNDS = {
    "greater_than": ("must be greater than", "gt"),
    "greater_than_equal": ("must be at least", "ge"),
    "less_than": ("must be less than", "lt"),
    "less_than_equal": ("must be at most", "le"),
}
_LENGTHS = {
    "too_short": ("must have at least {min_length} entries, not {actual_length}"),
    "too_long": ("must have at most {max_length} entries, not more"),
    "string_too_short": ("must have at least {min_length} characters"),
    "string_too_long": ("must have at most {max_length} characters"),
}
_PATTERNS = {
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$": "must be lower-case letters, digits and hyphens, no hyphen at either end",
    r"^[a-z]([-a-z0-9]*[a-z0-9])?$": "must be lower-case letters, digits and hyphens, a letter first, no hyphen last",
    r"^[a-z0-9][-.a-z0-9]*[a-z0-9]$": "must be lower-case letters, digits, hyphens and dots",
    r"^([a-z0-9]([-.a-z0-9]*[a-z0-9])?)?$": "must be lower-case letters, digits, hyphens and dots",
    r"^([^/]+(/[^/]+)*)?$": "must have no slash at either end and no two in a row",
    r"^(https?://[^/ ]+.*)?$": "must be a URL that begins with http:// or https://",
}


def message(detail: ErrorDetails) -> str:
    """Describe an error in one sentence: what is wrong with the value and what is allowed."""
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "missing":
        return _required(tuple(detail["loc"]))
    if kind == "extra_forbidden":
        return _unknown_field(tuple(detail["loc"]))
    if kind == "value_error":
        return str(context["error"])
    if given is None:
        return "is empty: give it a value, or leave the field out"
    if kind == "literal_error":
        return _one_of(_choices(tuple(detail["loc"])), given)
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"{words} {_number(context[key])}, not {_shown(given)}"
    if kind in _LENGTHS:
        return _LENGTHS[kind].format(**context).replace("at least 1 entries", "at least 1 entry")
    if kind == "string_pattern_mismatch":
        pattern = context["pattern"]
        return f"{_PATTERNS.get(pattern, f'must match {pattern}')}, not {_shown(given)}"
    return f"{_EXPECTED.get(kind, detail['msg'])}, not {_shown(given)}"


def _required(location: tuple[str | int, ...]) -> str:
    model = _model_at(location[:-1])
    field = next((f for f in model.model_fields.values() if f.alias == location[-1]), None) if model else None
    choices = get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
    if choices:
        return f"is required ({' or '.join(map(str, choices))})"
    if field and field.description:
        return f"is required ({field.description})"
    return "is required"


def _unknown_field(location: tuple[str | int, ...]) -> str:
    model = _model_at(location[:-1])
    allowed = sorted(field.alias or name for name, field in model.model_fields.items()) if model else []
    near = _near(str(location[-1]), allowed)
    return f"unknown field{near} (allowed: {', '.join(allowed)})"


def _one_of(choices: tuple[Any, ...], given: Any) -> str:
    near = _near(str(given), [str(choice) for choice in choices])
    listed = ", ".join(map(str, choices))
    return f"must be {'one of ' if len(choices) > 1 else ''}{listed}, not {_shown(given)}{near}"


def _near(given: str, allowed: list[str]) -> str:
    by_lower = {name.lower(): name for name in allowed}
    found = difflib.get_close_matches(given.lower().replace("_", ""), by_lower, n=1, cutoff=0.6)
    return f": did you mean {by_lower[found[0]]}?" if found else ""


def _choices(location: tuple[str | int, ...]) -> tuple[Any, ...]:
    model = _model_at(location[:-1])
    field = next(f for f in model.model_fields.values() if f.alias == location[-1]) if model else None
    return (
        next((get_args(part) for part in _parts(field.annotation) if get_origin(part) is Literal), ()) if field else ()
    )


def _model_at(location: tuple[str | int, ...]) -> type[Frozen] | None:
    """Return the model of the mapping at a location of the job; None: there is none."""
    annotations: tuple[Any, ...] = (PretrainJob,)
    for key in location:
        if isinstance(key, int):
            annotations = tuple(item for part in annotations for item in _parts(*get_args(part)))
            continue
        fields = [field for part in annotations if _is_model(part) for field in part.model_fields.values()]
        annotations = tuple(part for field in fields if field.alias == key for part in _parts(field.annotation))
    return next((part for part in annotations if _is_model(part)), None)


def _parts(*annotations: Any) -> tuple[Any, ...]:
    """Split unions: `X | None` -> X and None; other annotations are kept."""
    unions = (Union, types.UnionType)
    return tuple(part for item in annotations for part in (get_args(item) if get_origin(item) in unions else (item,)))


def _is_model(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, Frozen)


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
