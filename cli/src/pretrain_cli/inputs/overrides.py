"""`--set training.steps=100`: overrides of spec fields, applied before the job is checked."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pretrain_api.problems import InvalidJob, Location, Problem, path_text

_SEGMENT = re.compile(r"([A-Za-z][A-Za-z0-9]*)((?:\[[^\[\]]+\])*)")
_INDEX = re.compile(r"\[([^\[\]]+)\]")


@dataclass(frozen=True)
class Override:
    """Parsed `--set`. `keys` are fields, indexes, or names of list entries, from the spec down."""

    text: str
    keys: tuple[str | int, ...]
    value: Any
    location: Location = ()
    """Location in the job: `keys` from the top, with entry names replaced by indexes."""


def parse_override(text: str) -> Override:
    """Parse `training.data.sources[0].weight=2`; the value is YAML 1.2. Raises InvalidJob."""
    path, equals, value = text.partition("=")
    if not equals:
        raise _refused(text, "expected PATH=VALUE, for example training.steps=100")
    keys: list[str | int] = []
    for segment in path.strip().removeprefix("spec.").split("."):
        match = _SEGMENT.fullmatch(segment)
        if not match:
            raise _refused(text, f"{segment!r} is not a field: write for example training.data.sources[0].weight=2")
        keys.append(match[1])
        keys.extend(int(index) if index.isdecimal() else f"[{index}]" for index in _INDEX.findall(match[2]))
    try:
        parsed = YAML(typ="safe", pure=True).load(value)
    except (YAMLError, ValueError, RecursionError) as error:
        raise _refused(text, f"the value {value!r} is not valid YAML: put quotes around a string") from error
    return Override(text, tuple(keys), parsed)


def apply_overrides(data: dict[str, Any], overrides: Sequence[Override]) -> tuple[dict[str, Any], tuple[Override, ...]]:
    """Apply overrides, in order, to a copy of the job's data; return it and the overrides with their locations.

    Creates absent mappings on the way; an entry of a list must exist. Raises InvalidJob.
    """
    result = copy.deepcopy(data)
    located: list[Override] = []
    for override in overrides:
        if result.get("spec") is None:
            result["spec"] = {}
        place: Any = result["spec"]
        location: Location = ("spec",)
        for depth, key in enumerate(override.keys):
            found = _key_in(place, key, location, override.text)
            location = (*location, found)
            if depth == len(override.keys) - 1:
                place[found] = copy.deepcopy(override.value)
            else:
                place = _descend(place, found, override.keys[depth + 1])
        located.append(Override(override.text, override.keys, override.value, location))
    return result, tuple(located)


def _key_in(place: Any, key: str | int, location: Location, text: str) -> str | int:
    """Return the key or index in `place` that a part of an override's path refers to."""
    if isinstance(key, str) and not key.startswith("["):
        if isinstance(place, dict):
            return key
        raise _refused(text, f"{path_text(location)} has no fields: it is {_kind(place)}")
    if not isinstance(place, list):
        raise _refused(text, f"{path_text(location)} is not a list: it is {_kind(place)}")
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in place]
    if isinstance(key, int) and key < len(place):
        return key
    if isinstance(key, str) and key[1:-1] in names:
        return names.index(key[1:-1])
    known = ", ".join(str(name) for name in names if name is not None)
    entries = f"0 to {len(place) - 1}" if place else "none, the list is empty"
    raise _refused(text, f"{path_text(location)} has no such entry: use {entries}{known and f', or a name of {known}'}")


def _descend(place: Any, key: str | int, following: str | int) -> Any:
    """Return the value at a key; create an absent mapping."""
    if isinstance(key, int):
        return place[key]
    if place.get(key) is None:
        place[key] = {} if isinstance(following, str) and not following.startswith("[") else []
    return place[key]


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)


def _refused(text: str, message: str) -> InvalidJob:
    return InvalidJob("--set", (Problem("", f"{text}: {message}"),))
