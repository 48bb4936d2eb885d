"""The user-defined evaluation, `training.evaluation.hook`: imported at the start, called on all ranks between steps.

A function that cannot be imported ends the run at once. A failure of a later call is reported and training continues:
a broken evaluation is no reason to lose a run. A call leaves no trace in training: the random number generators, the
number of threads and the mode of the model are restored.
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

from pretrain_api.spec.data import MAX_METRICS, Evaluation
from pretrain_trainer.core.collectives import Collectives
from pretrain_trainer.core.errors import InvalidInput
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.evaluation.held_out import at_rest
from pretrain_trainer.evaluation.trained_model import (
    DIFFERENT,
    CallMatcher,
    EvaluatedModel,
    EvaluationAbandoned,
    Trained,
)
from pretrain_trainer.observability.failures import known_error

Hook = Callable[[Trained], Mapping[str, float]]

FIELD = "training.evaluation.hook"
NAME = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_./]{0,62}")
MODULE = "pretrain_evaluation_hook"
"""Name of the module of a file."""
PROBLEM_LENGTH = 1000


@dataclass(frozen=True)
class HookResult:
    """Result of a call: the metrics, or the problem."""

    metrics: dict[str, float] = field(default_factory=dict[str, float])
    problem: str = ""


class _InvalidResult(Exception):
    """The function returned something else than a mapping of names to numbers."""


def load_hook(evaluation: Evaluation | None) -> Hook | None:
    """Import the function that the job names, if any. Raises InvalidInput where that fails."""
    if evaluation is None or evaluation.hook is None:
        return None
    where, _, name = evaluation.hook.rpartition(":")
    try:
        module = _module_of_file(Path(where)) if evaluation.hook_file else importlib.import_module(where)
        function = getattr(module, name, None)
    except (Exception, SystemExit) as error:
        cause = f"{type(error).__name__}: {error}"
        raise InvalidInput(
            f"{FIELD}: {where} cannot be imported ({cause}): "
            "correct the name, or install what it needs where the ranks run"
        ) from error
    if not callable(function):
        raise InvalidInput(f"{FIELD}: {where} has no function {name}: correct the name, or define it there")
    return cast(Hook, function)


def call_hook(hook: Hook, evaluated: EvaluatedModel, progress: TrainingProgress) -> HookResult:
    """Call the function on all ranks, which agree on whether it succeeded. Collective.

    Re-raises errors that end the run: a lost peer, memory exhausted.
    """
    matcher, result = CallMatcher(), HookResult()
    with at_rest(evaluated.model), undisturbed(evaluated.ranks.device):
        try:
            result = HookResult(metrics=_checked(hook(Trained(evaluated, progress, matcher))))
        except (Exception, SystemExit) as error:
            # An OSError is the function's own: a file or a service that it uses is missing.
            if not isinstance(error, OSError) and known_error(error) is not None:
                raise
            result = HookResult(problem=_problem(error))
            if not isinstance(error, EvaluationAbandoned | _InvalidResult):
                traceback.print_exc()
    return _agreed(matcher, result)


def _agreed(matcher: CallMatcher, result: HookResult) -> HookResult:
    try:
        matcher.match("end", failed=bool(result.problem))
    except EvaluationAbandoned as abandoned:
        problems = Collectives(None).all_gather_object(result.problem)
        causes = [problem for problem in problems if problem and problem != _problem(abandoned)]
        return HookResult(problem=(causes or [DIFFERENT])[0])
    return result


def _problem(error: BaseException) -> str:
    text = str(error) if isinstance(error, EvaluationAbandoned | _InvalidResult) else f"{type(error).__name__}: {error}"
    return text[:PROBLEM_LENGTH]


def _checked(returned: object) -> dict[str, float]:
    if not isinstance(returned, Mapping):
        raise _InvalidResult(f"it returned a {type(returned).__name__}: return a mapping of names to numbers")
    metrics = {str(name): _number(str(name), value) for name, value in returned.items()}
    if len(metrics) > MAX_METRICS:
        raise _InvalidResult(f"it returned {len(metrics)} metrics: return at most {MAX_METRICS}")
    for name in metrics:
        if not NAME.fullmatch(name):
            raise _InvalidResult(
                f"the metric {name[:80]!r} has no safe name: use letters, digits and -_./ (at most 63)"
            )
    return metrics


def _number(name: str, value: object) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, Real) or not math.isfinite(value):
        raise _InvalidResult(
            f"the metric {name[:80]} is {str(value)[:80]}, no finite number: leave it out where not known"
        )
    return float(value)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Restore the random number generators and the number of threads afterwards."""
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
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # dataclasses and pickles of the module look here
    spec.loader.exec_module(module)
    return module
