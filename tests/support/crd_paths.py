"""Field paths and values against the schema of PretrainJob's CustomResourceDefinition."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tools.crd.definition import custom_resource_definition

Schema = Mapping[str, Any]
JOB: Schema = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
SPEC: Schema = JOB["properties"]["spec"]
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}


def schema_at(path: str, schema: Schema = JOB) -> Schema | None:
    """Return the schema at a path such as `.status.incidents[*].cause`; None: there is no such field."""
    for part in re.sub(r"\[[^\]]*\]", "", path).strip(".").split("."):
        schema = schema.get("items", schema)
        if schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema:
            return schema
        if part == "metadata" and schema is JOB:
            return {"x-kubernetes-preserve-unknown-fields": True}
        if part not in schema.get("properties", {}):
            return None
        schema = schema["properties"][part]
    return schema


def problems(value: object, schema: Schema, at: str) -> Iterator[str]:
    """Yield what of a value, which may lack required fields, the schema does not allow."""
    if schema.get("x-kubernetes-int-or-string"):
        if not isinstance(value, int | str):
            yield f"{at}: {value!r} is neither integer nor string"
        return
    kinds = _TYPES.get(schema.get("type", ""), (object,))
    if not isinstance(value, kinds):
        yield f"{at}: {value!r} is not of type {schema['type']}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{at}: {value!r} is not one of {schema['enum']}"
    elif isinstance(value, dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        for key, inner in value.items():
            field = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if field is None:
                yield f"{at}.{key}: no such field"
            else:
                yield from problems(inner, field, f"{at}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from problems(inner, schema.get("items", {}), f"{at}[{number}]")
