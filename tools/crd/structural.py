"""Translation of pydantic models to structural schemas, the JSON Schema dialect of CustomResourceDefinitions.

References are inlined. An optional field may be absent, but null only if that differs from absence. Defaults of objects
are written out, since the API server validates them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, cast

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from pretrain_api.spec.quantities import format_duration
from tools.crd.cel_rules import RULES

Schema = dict[str, Any]
_RULES_BY_NAME = {model.__name__: rules for model, rules in RULES.items()}
_COPIED = (
    "description", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems",
)  # fmt: skip
_EXTENSIONS = "x-kubernetes-"


def structural_spec(model: type[BaseModel]) -> Schema:
    """Translate a model of user input: with defaults and CEL rules."""
    schema = model.model_json_schema(schema_generator=_AsUsersWrite)
    return _Translation(schema.get("$defs", {}), defaults=True).object(schema)


def structural_status(model: type[BaseModel]) -> Schema:
    """Translate a model written by the operator: without defaults; null equals absence."""
    schema = model.model_json_schema()
    return _Translation(schema.get("$defs", {}), defaults=False).object(schema)


class _AsUsersWrite(GenerateJsonSchema):
    """Schema generator that writes default durations as `5m` instead of ISO 8601."""

    def encode_default(self, dft: Any) -> Any:
        """Encode a default as JSON."""
        return format_duration(dft) if isinstance(dft, timedelta) else super().encode_default(dft)


class _Translation:
    """Translation of one model: its definitions, with or without defaults."""

    def __init__(self, definitions: Mapping[str, Schema], *, defaults: bool) -> None:
        self._definitions = definitions
        self._defaults = defaults

    def object(self, schema: Schema) -> Schema:
        """Translate an object with properties."""
        result: Schema = _copied(schema) | {
            "type": "object",
            "properties": {name: self._property(field) for name, field in schema["properties"].items()},
        }
        if required := schema.get("required"):
            result["required"] = list(required)
        if rules := _RULES_BY_NAME.get(schema.get("title", "")):
            result["x-kubernetes-validations"] = [rule._asdict() for rule in rules]
        return result

    def _property(self, field: Schema) -> Schema:
        variants = [variant for variant in field.get("anyOf", ()) if variant != {"type": "null"}]
        optional = len(variants) < len(field.get("anyOf", ()))
        inner = variants[0] | {k: v for k, v in field.items() if k != "anyOf"} if optional else field
        result = self._translate(inner)
        default = field.get("default")
        if optional and (default is not None or not self._defaults):
            result["nullable"] = True
        if default is not None and self._defaults:
            result["default"] = _without_nulls(default)
        return result

    def _translate(self, schema: Schema) -> Schema:
        if reference := schema.get("$ref"):
            target = self._definitions[reference.removeprefix("#/$defs/")]
            return self._translate(target | {k: v for k, v in schema.items() if k not in ("$ref", "default")})
        if "properties" in schema:
            return self.object(schema)
        if schema.get("x-kubernetes-int-or-string"):
            return _copied(schema) | {"anyOf": schema["anyOf"]}
        result = _copied(schema) | {"type": schema["type"]}
        if schema["type"] == "array":
            result |= self._array(schema)
        elif schema["type"] == "integer":
            result["format"] = "int64"
        elif isinstance(schema.get("additionalProperties"), dict):
            result["additionalProperties"] = self._translate(schema["additionalProperties"])
        return result

    def _array(self, schema: Schema) -> Schema:
        """Translate a list, or a tuple of equal items: structural schemas support no others."""
        items = schema["items"] if "items" in schema else schema["prefixItems"][0]
        return {"items": self._translate(items)}


def _without_nulls(default: Any) -> Any:
    if not isinstance(default, dict):
        return default
    members = cast(dict[str, Any], default)
    return {name: _without_nulls(value) for name, value in members.items() if value is not None}


def _copied(schema: Schema) -> Schema:
    """Copy the keywords common to both dialects; exclusive bounds become flags."""
    result = {key: schema[key] for key in _COPIED if key in schema}
    if "const" in schema:
        result["enum"] = [schema["const"]]
    for bound, flag in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if flag in schema:
            result |= {bound: schema[flag], flag: True}
    return result | {key: value for key, value in schema.items() if key.startswith(_EXTENSIONS)}
