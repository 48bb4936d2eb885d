"""The user's own evaluation, `training.evaluation.hook`: found when the run starts, called on all ranks between steps.

Where it cannot be had the run ends at once. What goes wrong in it later is said, and training goes on: an evaluation
that does not work is no reason to lose a run. It leaves no trace: the model trains on afterwards, random numbers that
were taken are put back.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import random
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import cast

import numpy as np
import torch
from torch import Tensor

from pretrain_api.spec.training import MAX_METRICS, Evaluation
from pretrain_trainer.core.collectives import Collectives
from pretrain_trainer.core.errors import InvalidInput
from pretrain_trainer.core.progress import Progress
from pretrain_trainer.eval_api import DIFFERENT, GivenUp, Meeting, Trained
from pretrain_trainer.evaluation.held_out import at_rest
from pretrain_trainer.loop.setup import Run
from pretrain_trainer.observability.failures import known_error

Hook = Callable[[Trained], Mapping[str, float]]

FIELD = "training.evaluation.hook"
NAME = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_./]{0,62}")
MODULE = "pretrain_evaluation_hook"
"""The name by which a file's module is known."""
PROBLEM_LENGTH = 1000


@dataclass(frozen=True)
class Answer:
    """What became of a call: the metrics, or what went wrong."""

    metrics: dict[str, float] = field(default_factory=dict[str, float])
    problem: str = ""


class _Nonsense(Exception):
    """What the function returned is no mapping of names to numbers."""


def load_hook(evaluation: Evaluation | None) -> Hook | None:
    """The function that the job names, if it names one. Raises InvalidInput when it cannot be had."""
    if evaluation is None or evaluation.hook is None:
        return None
    where, _, name = evaluation.hook.rpartition(":")
    try:
        module = _module_of_file(Path(where)) if evaluation.hook_file else importlib.import_module(where)
        function = getattr(module, name, None)
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}"
        raise InvalidInput(
            f"{FIELD}: {where} cannot be imported ({said}): correct the name, or what it needs where ranks run"
        ) from error
    if not callable(function):
        raise InvalidInput(f"{FIELD}: {where} has no function {name}: correct the name, or define it there")
    return cast(Hook, function)


def call_hook(hook: Hook, run: Run, progress: Progress) -> Answer:
    """Call it on all ranks; they agree on whether it worked. Collective. Raises what ends the run: a peer that went
    away, memory that is out."""
    meeting, answer = Meeting(), Answer()
    with at_rest(run.model), undisturbed(run.ranks.device):
        try:
            answer = Answer(metrics=_checked(hook(Trained(run, progress, meeting))))
        except (Exception, SystemExit) as error:
            # An OSError is the function's own: what it writes or whom it calls is not there.
            if not isinstance(error, OSError) and known_error(error) is not None:
                raise
            answer = Answer(problem=_said(error))
            if not isinstance(error, GivenUp | _Nonsense):
                traceback.print_exc()
    return _agreed(meeting, answer)


def _agreed(meeting: Meeting, answer: Answer) -> Answer:
    try:
        meeting.at("end", failed=bool(answer.problem))
    except GivenUp as given_up:
        said = Collectives(None).all_gather_object(answer.problem)
        causes = [problem for problem in said if problem and problem != _said(given_up)]
        return Answer(problem=(causes or [DIFFERENT])[0])
    return answer


def _said(error: BaseException) -> str:
    text = str(error) if isinstance(error, GivenUp | _Nonsense) else f"{type(error).__name__}: {error}"
    return text[:PROBLEM_LENGTH]


def _checked(returned: object) -> dict[str, float]:
    if not isinstance(returned, Mapping):
        raise _Nonsense(f"it returned a {type(returned).__name__}: return a mapping of names to numbers")
    metrics = {str(name): _number(str(name), value) for name, value in returned.items()}
    if len(metrics) > MAX_METRICS:
        raise _Nonsense(f"it returned {len(metrics)} metrics: return at most {MAX_METRICS}")
    for name in metrics:
        if not NAME.fullmatch(name):
            raise _Nonsense(f"the metric {name[:80]!r} has no safe name: use letters, digits and -_./ (at most 63)")
    return metrics


def _number(name: str, value: object) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, Real) or not math.isfinite(value):
        raise _Nonsense(f"the metric {name[:80]} is {str(value)[:80]}, no finite number: leave it out where not known")
    return float(value)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Random numbers that are taken inside, and another number of threads, are as before afterwards."""
    drawn, arrays, numbers, threads = (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.get_num_threads(),
    )
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        random.setstate(drawn)
        np.random.set_state(arrays)
        torch.set_rng_state(numbers)
        torch.set_num_threads(threads)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)


def _module_of_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no file of Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # where dataclasses and pickles of it look
    spec.loader.exec_module(module)
    return module
