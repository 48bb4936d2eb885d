"""Base classes of serialised types: frozen, camelCase in JSON, snake_case in Python."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Self, cast

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema

INT64 = 2**63
MAX_STRING = 8192
"""Maximum characters of a string in a message, unless its field has another limit."""
MAX_ITEMS = 10_000
"""Maximum items of a collection in a message, unless its field has another limit."""


class Frozen(BaseModel):
    """Immutable value that refuses unknown fields: base of user input and of files on disk."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        populate_by_name=True,
        serialize_by_alias=True,
        ser_json_inf_nan="strings",  # JSON has no NaN, and null does not parse as a number
    )

    def to_json(self) -> str:
        """Serialise as one line of JSON with camelCase keys."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse the output of `to_json`. Raises pydantic's ValidationError on anything else."""
        return cls.model_validate_json(text)


_BOUNDS: dict[str, dict[str, Any]] = {
    "int": {"ge": -INT64, "le": INT64 - 1},
    "float": {"allow_inf_nan": False},
    "str": {"max_length": MAX_STRING},
    "tuple": {"max_length": MAX_ITEMS},
    "dict": {"max_length": MAX_ITEMS},
}
_OPPOSITE = {"ge": "gt", "le": "lt"}


def _bound(schema: dict[str, Any]) -> None:
    """Add the missing bounds to the schema of a field and of the values inside."""
    for name, value in _BOUNDS.get(schema["type"], {}).items():
        if _OPPOSITE.get(name) not in schema:
            schema.setdefault(name, value)
    for name in ("schema", "keys_schema", "values_schema"):
        if name in schema:
            _bound(schema[name])
    for item in schema.get("items_schema", ()):
        _bound(item)
    if schema["type"] == "model-fields":
        for field in schema["fields"].values():
            _bound(field["schema"])


def _fields_of(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the fields of a model's schema, which validators may wrap."""
    while schema["type"] != "model-fields":
        schema = schema["schema"]
    return schema["fields"]


class Wire(Frozen):
    """Message: like Frozen, but ignores unknown fields, so that a newer peer may add some.

    The peer is not trusted: integers are 64-bit, other numbers finite, strings and collections limited. A field's own
    bounds replace these.
    """

    model_config = ConfigDict(extra="ignore")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Bound the fields of each message class."""
        schema = handler(source)
        for field in _fields_of(cast(dict[str, Any], handler.resolve_ref_schema(schema))).values():
            field["schema"] = deepcopy(field["schema"])  # values inside keep their schemas elsewhere
            _bound(field["schema"])
        return schema


class Spec(Frozen):
    """User input, validated as strictly as by the API server: no string for a number, no infinity.

    Lists become tuples, so tuple fields opt out of strict mode for themselves, not for their items.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
