"""Job files: YAML 1.2 text -> PretrainJob, or every mistake in it with its path, its line and what is allowed.

Errors: `InvalidJob` holds the `Problem`s and is the only thing raised here for bad input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from pretrain_api.problems import InvalidJob, Location, Problem, path_text
from pretrain_api.spec.job import PretrainJob
from pretrain_cli.inputs.error_text import worded
from pretrain_cli.inputs.overrides import Override, apply_overrides, parse_override

_TEXT_TYPES = (str, bool, int, float, type(None))


@dataclass(frozen=True)
class Document:
    """A job file as plain data, and where its fields stand."""

    data: Any
    root: Node | None

    def line(self, location: Location) -> int | None:
        """The line of a field (from 1), or of the nearest one around it."""
        if self.root is None:
            return None
        node, line = self.root, self.root.start_mark.line
        for key in location:
            found = _child(node, key)
            if found is None:
                break
            node, line = found
        return line + 1


def load_job(path: Path, sets: Sequence[str] = ()) -> PretrainJob:
    """Parse a job file with `--set` overrides applied. Raises InvalidJob with all that is wrong."""
    return parse_job(_read(path), str(path), sets)


def parse_job(text: str, source: str, sets: Sequence[str] = ()) -> PretrainJob:
    """Parse a job file's text; `source` is its name in messages. Raises InvalidJob with all that is wrong."""
    document = _document(text, source)
    data, overrides = apply_overrides(document.data, [parse_override(text) for text in sets])
    try:
        return PretrainJob.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as error:
        raise InvalidJob(source, _problems(error, document, overrides)) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidJob(str(path), (Problem("", "the file is not UTF-8 text: save it as UTF-8"),)) from error
    except OSError as error:
        message = f"the file cannot be read ({error.strerror}): check the path"
        raise InvalidJob(str(path), (Problem("", message),)) from error


def _document(text: str, source: str) -> Document:
    """Parse the YAML; refuse what JSON could not carry, since the same file goes to Kubernetes."""
    try:
        data = YAML(typ="safe", pure=True).load(text)
        root = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        said = " ".join((error.problem or str(error)).split())
        raise InvalidJob(source, (Problem("", f"this is no YAML: {said}", line),)) from error
    except (YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number that does not exist
        said = " ".join(str(error).split())
        raise InvalidJob(source, (Problem("", f"this is no YAML: {said}"),)) from error
    document = Document(data, root)
    if data is None:
        raise InvalidJob(source, (Problem("", "the file is empty: a PretrainJob is wanted"),))
    if not isinstance(data, dict):
        raise InvalidJob(source, (Problem("", "a PretrainJob is wanted: `key: value` lines, apiVersion first"),))
    if problems := tuple(_no_json(data, (), ())):
        raise InvalidJob(source, tuple(replace(p, line=document.line(p.location)) for p in problems))
    return document


def _no_json(value: Any, location: Location, around: tuple[int, ...]) -> Iterable[Problem]:
    if id(value) in around:
        yield Problem(path_text(location), "refers to what it is part of: write it out", location=location)
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str):
                yield from _no_json(item, (*location, key), (*around, id(value)))
            else:
                message = f"the key {key!r} is no text: put quotes around it"
                yield Problem(path_text(location), message, location=location)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _no_json(item, (*location, index), (*around, id(value)))
    elif not isinstance(value, _TEXT_TYPES):
        message = f"a {type(value).__name__} is not allowed here: put quotes around a text"
        yield Problem(path_text(location), message, location=location)


def _problems(error: ValidationError, document: Document, overrides: Sequence[Override]) -> tuple[Problem, ...]:
    details = error.errors(include_url=False)
    locations: set[Location] = {detail["loc"] for detail in details}
    problems: list[Problem] = []
    for detail in details:
        location: Location = detail["loc"]
        if detail["type"] == "too_short" and any(location == other[: len(location)] != other for other in locations):
            continue  # pydantic does not count entries with mistakes of their own
        origin = next((f"--set {o.text}" for o in reversed(overrides) if _concerns(o.location, location)), "")
        line = None if origin else document.line(location)
        problems.append(Problem(path_text(location), worded(detail), line, location, origin))
    return tuple(sorted(problems, key=lambda problem: problem.line or 0))


def _concerns(override: Location, location: Location) -> bool:
    """The mistake lies in what was overridden, or is one of something around it."""
    shorter = min(len(override), len(location))
    return override[:shorter] == location[:shorter]


def _child(node: Node, key: str | int) -> tuple[Node, int] | None:
    """The value under a key or index, and the line where the key or the entry stands."""
    if isinstance(node, MappingNode):
        for key_node, value in node.value:
            if key_node.value == key:
                return value, key_node.start_mark.line
    if isinstance(node, SequenceNode) and isinstance(key, int) and key < len(node.value):
        return node.value[key], node.value[key].start_mark.line
    return None
