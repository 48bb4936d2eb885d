"""The base of every type that leaves a process: frozen, camelCase in JSON, snake_case in Python."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class Frozen(BaseModel):
    """A value: immutable, its unknown fields refused. The base of what users write and of what is kept on disk."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        populate_by_name=True,
        serialize_by_alias=True,
        ser_json_inf_nan="strings",  # JSON has no NaN, and null would not be read back as a number
    )

    def to_json(self) -> str:
        """This value as one line of JSON with camelCase keys."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse what `to_json` wrote; raises pydantic's ValidationError on anything else."""
        return cls.model_validate_json(text)


class Wire(Frozen):
    """A message: like Frozen, but unknown fields are ignored, so that a newer peer may add some."""

    model_config = ConfigDict(extra="ignore")


class Spec(Frozen):
    """What a user writes. As strict as the API server: no text for a number, no infinity.

    Lists become tuples, so fields that are tuples opt out of strictness for themselves, not for their items.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
