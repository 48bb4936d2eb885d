"""Job files: parses YAML 1.2 to a PretrainJob, or lists every mistake with its field, line and fix.

Errors: bad input raises `InvalidJob`, which holds the `Problem`s, and nothing else.
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
from pretrain_cli.inputs import error_text
from pretrain_cli.inputs.overrides import Override, apply_overrides, parse_override

_TEXT_TYPES = (str, bool, int, float, type(None))


@dataclass(frozen=True)
class JobDocument:
    """Job file as plain data, with the lines of its fields."""

    data: Any
    root: Node | None

    def line(self, location: Location) -> int | None:
        """Return the line of a field (from 1), or of its nearest ancestor."""
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
    """Parse a job file with `--set` overrides applied. Raises InvalidJob with all mistakes."""
    return parse_job(_read(path), str(path), sets)


def parse_job(text: str, source: str, sets: Sequence[str] = ()) -> PretrainJob:
    """Parse the text of a job file; `source` is its name in messages. Raises InvalidJob with all mistakes."""
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


def _document(text: str, source: str) -> JobDocument:
    """Parse the YAML. Refuses values that JSON cannot represent, since the same file goes to Kubernetes."""
    try:
        data = YAML(typ="safe", pure=True).load(text)
        root = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        said = " ".join((error.problem or str(error)).split())
        raise InvalidJob(source, (Problem("", f"invalid YAML: {said}", line),)) from error
    except (YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number that does not exist
        said = " ".join(str(error).split())
        raise InvalidJob(source, (Problem("", f"invalid YAML: {said}"),)) from error
    document = JobDocument(data, root)
    if data is None:
        raise InvalidJob(source, (Problem("", "the file is empty: expected a PretrainJob"),))
    if not isinstance(data, dict):
        raise InvalidJob(source, (Problem("", "expected a PretrainJob: `key: value` lines, apiVersion first"),))
    if problems := tuple(_no_json(data, (), ())):
        raise InvalidJob(source, tuple(replace(p, line=document.line(p.location)) for p in problems))
    return document


def _no_json(value: Any, location: Location, around: tuple[int, ...]) -> Iterable[Problem]:
    if id(value) in around:
        yield Problem(path_text(location), "is an alias of its own ancestor: write the value out", location=location)
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str):
                yield from _no_json(item, (*location, key), (*around, id(value)))
            else:
                message = f"the key {key!r} is not a string: put quotes around it"
                yield Problem(path_text(location), message, location=location)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _no_json(item, (*location, index), (*around, id(value)))
    elif not isinstance(value, _TEXT_TYPES):
        message = f"a {type(value).__name__} is not allowed here: put quotes around a string"
        yield Problem(path_text(location), message, location=location)


def _problems(error: ValidationError, document: JobDocument, overrides: Sequence[Override]) -> tuple[Problem, ...]:
    details = error.errors(include_url=False)
    locations: set[Location] = {detail["loc"] for detail in details}
    problems: list[Problem] = []
    for detail in details:
        location: Location = detail["loc"]
        if detail["type"] == "too_short" and any(location == other[: len(location)] != other for other in locations):
            continue  # pydantic does not count entries that have mistakes themselves
        origin = next((f"--set {o.text}" for o in reversed(overrides) if _concerns(o.location, location)), "")
        line = None if origin else document.line(location)
        problems.append(Problem(path_text(location), error_text.message(detail), line, location, origin))
    return tuple(sorted(problems, key=lambda problem: problem.line or 0))


def _concerns(override: Location, location: Location) -> bool:
    """Return True if the mistake is within the override, or in one of its ancestors."""
    shorter = min(len(override), len(location))
    return override[:shorter] == location[:shorter]


def _child(node: Node, key: str | int) -> tuple[Node, int] | None:
    """Find the value at a key or index, and the line of the key or entry."""
    if isinstance(node, MappingNode):
        for key_node, value in node.value:
            if key_node.value == key:
                return value, key_node.start_mark.line
    if isinstance(node, SequenceNode) and isinstance(key, int) and key < len(node.value):
        return node.value[key], node.value[key].start_mark.line
    return None
