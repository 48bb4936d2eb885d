"""Code, runs and jobs of commit 79a43e8, which `fixtures/make_79a43e8.py` made: newer code must resume them.

Imports nothing of this project: the fixtures are made by running it under the old code.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

FIXTURES = Path(__file__).parent / "fixtures" / "79a43e8"
PLACE = "@PLACE@"
"""In texts of the run: the folder that the run and its data were in."""
CODE_VARIABLE = "TEST_OLD_CODE"
_SHIM = f"""\
import os, sys
from importlib import metadata, util

code = os.environ.get("{CODE_VARIABLE}")
if code and "pretrain_agent" in sys.orig_argv:
    sys.path.insert(0, code)
    os.environ["PYTHONPATH"] = code
    handler, = metadata.entry_points(group="torchrun.handlers", name="pretrain")
    with open(os.path.join(os.path.dirname(__file__), f"agent-{{os.getpid()}}"), "w") as file:
        file.write(f"{{util.find_spec('pretrain_agent').origin}} {{handler.dist.locate_file('')}}")
"""
"""Of each of these agents a file beside it names where its code and its handler of the rendezvous come from."""


def unpack(archive: str, into: Path) -> Path:
    """Unpack an archive of the fixtures into a new folder, which is returned."""
    into.mkdir(parents=True)
    with tarfile.open(FIXTURES / archive) as tar:
        tar.extractall(into, filter="data")
    return into


def old_code(into: Path) -> Path:
    """Unpack the old packages: what is first on PYTHONPATH, dist-info and entry points included."""
    return unpack("code.tar.xz", into)


def old_agents(code: Path, into: Path) -> dict[str, str]:
    """Return the environment of a `pretrain run` whose agents, and the ranks below them, run the old code."""
    into.mkdir()
    (into / "sitecustomize.py").write_text(_SHIM)
    return {"PYTHONPATH": str(into), CODE_VARIABLE: str(code)}


def old_python(code: Path, *arguments: str, given: str = "") -> str:
    """Run a Python of the old code to its successful end and return its output."""
    environ = {**os.environ, "PYTHONPATH": str(code)}
    done = subprocess.run(
        [sys.executable, *arguments], input=given, env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def old_run(into: Path) -> Path:
    """Unpack a stopped run: `job.yaml` with its data, and `run`, the folder that `--out` named."""
    place = unpack("run.tar.xz", into)
    for path in text_files(place):
        path.write_text(path.read_text().replace(PLACE, str(place)))
    return place


def text_files(place: Path) -> Iterator[Path]:
    """The files of the run that name folders."""
    yield place / "run" / "job.yaml"
    yield place / "run" / "trainer.json"


def continued_losses() -> dict[int, float]:
    """The losses that the old code has from where the run was stopped, on the machine that made the fixtures."""
    return {int(step): loss for step, loss in json.loads((FIXTURES / "continued.json").read_text()).items()}


def messages() -> list[tuple[str, dict[str, Any]]]:
    """(type, JSON) of every message and file format: with required fields only, and with all."""
    lines = (FIXTURES / "messages.jsonl").read_text().splitlines()
    return [(line["type"], line["json"]) for line in map(json.loads, lines)]


def lost(old: Any, new: Any, place: str = "") -> list[str]:
    """Return the places of an old JSON value that a new one lacks or has changed; what the new one adds is its own."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [found for key in old for found in lost(old[key], new.get(key), f"{place}.{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [found for index, item in enumerate(old) for found in lost(item, new[index], f"{place}[{index}]")]
    return [] if old == new else [f"{place}: {old!r} became {new!r}"]


def cluster_job() -> dict[str, Any]:
    """A job in mid-run: `job`, `pods` and the `hellos` of the agents in them."""
    return json.loads((FIXTURES / "cluster.json").read_text())


TEXTS = ("text", "00000.bin", "0" * 64)
"""One of them matches the pattern of any field."""


def filled(annotation: Any, full: bool, pattern: str = "") -> Any:
    """Make a value of a type: of models with required fields only, or with all."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return filled(arguments[0], full)
    if origin in (Union, UnionType):
        return filled(next(item for item in arguments if item is not NoneType), full, pattern)
    if origin is Literal:
        return arguments[-1]
    if origin is tuple:
        return tuple(filled(item, full) for item in arguments if item is not Ellipsis)
    if origin is not None:
        return {filled(arguments[0], full): filled(arguments[1], full)}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation(**_fields(annotation, full))
    if annotation is str:
        return next(text for text in TEXTS if re.search(pattern, text))
    return {int: 3, float: 0.1, bool: True, Any: "anything"}[annotation]


def _fields(model: type[BaseModel], full: bool) -> dict[str, Any]:
    values = {}
    for name, field in model.model_fields.items():
        if full or field.is_required():
            patterns = [item.pattern for item in field.metadata if getattr(item, "pattern", None)]
            values[name] = filled(field.annotation, full, "".join(patterns))
    return values
