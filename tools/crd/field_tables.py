"""docs/pretrainjob.md: every field of the resource in tables, for whom `kubectl explain` is not at hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tools.crd.definition import custom_resource_definition
from tools.docs.prose import wrapped

_HEAD = """# The PretrainJob, field by field

Generated from the models in `api/` by `python -m tools.crd`: change those, not this page. On a cluster
`kubectl explain pretrainjob.spec --recursive` prints the same. `pretrain validate JOB.yaml` checks a file. `--set` of
`pretrain run` overrides any of these fields.
"""
Schema = Mapping[str, Any]


def text() -> str:
    """Return the whole document: a section for each object, in the order of the job file."""
    version = custom_resource_definition()["spec"]["versions"][0]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return wrapped(_HEAD + "".join(_sections("spec", spec)))


def _sections(path: str, schema: Schema) -> Iterator[str]:
    fields: Mapping[str, Schema] = schema["properties"]
    yield f"\n## `{path}`\n\n{_sentence(schema)}| field | type | default | meaning |\n| --- | --- | --- | --- |\n"
    for name, field in fields.items():
        yield f"| `{name}`{_needed(name, schema)} | {_kind(field)} | {_default(field)} | {_cell(_meaning(field))} |\n"
    rules = [rule["message"] for rule in schema.get("x-kubernetes-validations", ()) if "message" in rule]
    if rules:
        yield "\nRefused:\n\n" + "".join(f"- {rule}\n" for rule in dict.fromkeys(rules))
    for name, field in fields.items():
        inner = field.get("items", field)
        if "properties" in inner:
            yield from _sections(f"{path}.{name}{'[]' if inner is not field else ''}", inner)


def _sentence(schema: Schema) -> str:
    description = schema.get("description", "")
    return f"{description.rstrip('.')}.\n\n" if description else ""


def _needed(name: str, schema: Schema) -> str:
    return " (required)" if name in schema.get("required", ()) else ""


def _kind(field: Schema) -> str:
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if "items" in field:
        return f"list of {_kind(field['items'])}"
    if field.get("type") == "object" and "additionalProperties" in field:
        return f"map to {_kind(field['additionalProperties'])}"
    name = "integer or string" if field.get("x-kubernetes-int-or-string") else field.get("type", "any")
    return f"{name}{_bounds(field)}"


def _bounds(field: Schema) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    above = "above" if field.get("exclusiveMinimum") else "from"
    below = "below" if field.get("exclusiveMaximum") else "to"
    parts = [f"{above} {_number(low)}"] if low is not None else []
    parts += [f"{below} {_number(high)}"] if high is not None else []
    return f", {' '.join(parts)}" if parts else ""


def _number(value: float) -> str:
    return f"{value:,}".removesuffix(".0")


def _default(field: Schema) -> str:
    value = field.get("default")
    if value in (None, "", {}, []) or isinstance(value, dict):  # those of an object stand in its own section
        return ""
    return f"`{json.dumps(value) if not isinstance(value, str) else value}`"


def _meaning(field: Schema) -> str:
    return field.get("description") or field.get("items", {}).get("description", "")


def _cell(words: str) -> str:
    return " ".join(words.split()).replace("|", "\\|")
