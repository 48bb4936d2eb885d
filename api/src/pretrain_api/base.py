"""Base classes of serialised types: frozen, camelCase in JSON, snake_case in Python."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


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


class Wire(Frozen):
    """Message: like Frozen, but ignores unknown fields, so that a newer peer may add some."""

    model_config = ConfigDict(extra="ignore")


class Spec(Frozen):
    """User input, validated as strictly as by the API server: no string for a number, no infinity.

    Lists become tuples, so tuple fields opt out of strict mode for themselves, not for their items.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
