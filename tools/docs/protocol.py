"""Page docs/reference/protocol.md: every message between ranks, agents and coordinator, field by field."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pretrain_api.checkpoint import lineage
from pretrain_api.messages import protocol, reports
from tools.docs.prose import wrapped

_HEAD = f"""# Wire protocol

Generated from the message models in `api/` by `python -m tools.docs`: change those, not this page.

Agents and the coordinator exchange JSON texts over one WebSocket per agent. `kind` names the message, keys are
camelCase, and the protocol version is {protocol.PROTOCOL_VERSION}. Receivers ignore unknown fields. The coordinator
answers an unknown kind with `error`; an agent drops it. Every message of the coordinator carries the epoch of its
operator, and an agent refuses a lower epoch than the highest that it has seen.
"""
_GROUPS = (
    ("Agent to coordinator", protocol.AgentMessage),
    ("Coordinator to agent", protocol.CoordinatorMessage),
    ("Reports: rank to agent, forwarded in `report`", reports.ReportBody),
)
_SHARED: tuple[type[BaseModel], ...] = (
    protocol.Generation,
    protocol.Member,
    reports.MemoryUse,
    lineage.StepRange,
    lineage.Rollback,
)


def messages(union: object) -> tuple[type[BaseModel], ...]:
    """Return the members of a discriminated union in the order of its definition."""
    return get_args(get_args(union)[0])


def text() -> str:
    """Return the whole page: the messages of each direction, then the values inside them."""
    parts = [f"\n## {heading}\n" + "".join(_section(it) for it in messages(union)) for heading, union in _GROUPS]
    shared = "\n## Values inside messages\n" + "".join(_section(it) for it in _SHARED)
    return wrapped(_HEAD + "".join(parts) + shared)


def _section(model: type[BaseModel]) -> str:
    model.model_rebuild()  # resolves annotations of classes that are defined later
    kind = model.model_fields.get("kind")
    heading = f"`{kind.default}`" if kind is not None else f"`{model.__name__}`"
    about = inspect.cleandoc(model.__doc__ or "")
    return "\n".join((f"\n### {heading}\n", about, *_table(model.model_fields), ""))


def _table(fields: Mapping[str, FieldInfo]) -> Iterator[str]:
    shown = {name: field for name, field in fields.items() if name != "kind"}
    if shown:
        yield "\n| field | type | default | meaning |\n| --- | --- | --- | --- |"
        for name, field in shown.items():
            yield f"| `{field.alias or name}` | {_type(field.annotation)} | {_default(field)} | {_meaning(field)} |"


def _type(kind: object) -> str:
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(inside[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inside)
    if origin in (Union, types.UnionType):
        if inside == messages(reports.ReportBody):
            return "a report, see below"
        return " or ".join(dict.fromkeys(_type(it) for it in inside))
    if origin is tuple or origin is list:
        return f"list of {_type(inside[0])}"
    if origin is dict:
        return f"map to {_type(inside[1])}"
    return _SIMPLE.get(kind) or (f"`{kind.__name__}`" if isinstance(kind, type) else str(kind))


_SIMPLE: Mapping[object, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    type(None): "null",
}


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return f"`{json.dumps(value)}`" if value not in (None, "", (), {}) else ""


def _meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")
