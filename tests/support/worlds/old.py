"""Code, runs and jobs of commit 79a43e8, which `tests/fixtures/make_79a43e8.py` made: newer code must resume them.

Imports nothing of this project: the fixtures are made by running it under the old code.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

FIXTURES = Path(__file__).parents[2] / "fixtures" / "79a43e8"
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
    shutil.unpack_archive(FIXTURES / archive, into)  # extractall has no `filter` before Python 3.11.4
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


PROGRAM = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from pretrain_agent.client import connect
from pretrain_api import reports
from pretrain_api.lineage import manifest_key

saved = Path(sys.argv[1])
rank = int(os.environ["RANK"])
link = connect(rank, int(os.environ["LOCAL_RANK"]), os.environ)
number = link.generation.number
dist.init_process_group("gloo")
step = int(saved.read_text()) if saved.exists() else 0
if rank == 0:
    link.report(reports.Restored(step=step, checkpoint=manifest_key(1, step) if step else None, parameters=1))
while True:
    asked = torch.tensor([float(len(commands := link.commands()))])
    try:
        dist.all_reduce(asked)
    except RuntimeError:
        time.sleep(600)  # another rank is gone: the agent ends this one
    step += 1
    done = {"step": step, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "tokens": step, "tokens_per_second": 1}
    link.report(reports.Progress(step=step) if rank else reports.StepDone(**done, seconds=0.02))
    if asked[0]:
        command = (commands or link.wait_command(60.0))[0]
        if rank == 0:
            saved.write_text(str(step))
        link.report(reports.Held(command_id=command.id, step=step, checkpoint=manifest_key(number, step)))
        link.wait_command(60.0)
        link.report(reports.Resumed(command_id=command.id, step=step))
    time.sleep(0.02)
"""
"""For agents of the old code: counts steps, which all ranks do together, and takes checkpoints on command."""


class OldAgent:
    """An agent of the old code as a process, with a rank that counts; a Kubelet can make it."""

    def __init__(self, code: Path, folder: Path, url: str, job_uid: str, worker: Any, token: Path, *_: object) -> None:
        self.worker = worker
        self.exited = asyncio.Event()
        program = folder / "program.py"
        program.write_text(PROGRAM)
        self.log = folder / f"agent-{worker.slot}.{worker.attempt}.log"
        command = [
            sys.executable, "-m", "pretrain_agent", "--coordinator", url, "--job-uid", job_uid,
            "--slot", str(worker.slot), "--attempt", str(worker.attempt), "--token-file", str(token),
            "--", str(program), str(folder / "saved"),
        ]  # fmt: skip
        environ = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, start_new_session=True
            )
        self._waiting = asyncio.create_task(self._wait())

    async def kill(self) -> None:
        """SIGKILL, to its ranks as well."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self._waiting

    async def _wait(self) -> None:
        await asyncio.to_thread(self.process.wait)
        self.exited.set()


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
