"""Callbacks: extensions of the training loop that need no change of the loop.

Every rank runs the same callbacks in the same order, the order of registration. One step of the loop:

```
before_step        all callbacks
  data, forward, backward, reduction, optimizer
after_step         callbacks that are not collective
  the save of the step starts, commands of the coordinator are carried out
after_step         collective callbacks
on_checkpoint      all callbacks, on rank 0 only, once for each save that ended; none may communicate
```

Collective callbacks run last, since they may take long and neither a save nor a drain waits for them. A step that is
rolled back has no `after_step`. `on_end` follows the last step, after its checkpoint is committed.

An exception of a callback ends the run as an error of the loop does; the callbacks after it are not called. An
exception on one rank only leaves the others waiting in their next collective until they notice the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

from torch.utils._python_dispatch import TorchDispatchMode

from pretrain_api.messages.reports import Evaluated, Saved, SaveFailed, StepDone
from pretrain_trainer.core.progress import TrainingProgress

COLLECTIVE_NAMESPACES = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd"})
"""Namespaces of the operators behind torch.distributed."""


class UndeclaredCollective(RuntimeError):
    """A callback used torch.distributed without declaring `collective`, or on one rank only."""


@dataclass(frozen=True)
class CompletedStep:
    """A step whose update was made, or dropped."""

    progress: TrainingProgress
    report: StepDone
    finite: bool
    """False where loss or gradient is not a number; the update was dropped."""
    last: bool
    """True for the last step of the run."""


class Callback:
    """Base class of callbacks; each method does nothing. All ranks call it unless the method says otherwise."""

    collective: ClassVar[bool] = False
    """Declares that the methods use torch.distributed. They must then call the same collectives on all ranks."""

    def before_step(self, step: int) -> None:
        """Act before step `step`; the time does not count as the step's."""

    def after_step(self, completed: CompletedStep) -> None:
        """Act on a step whose update was made or dropped."""

    def on_checkpoint(self, outcome: Saved | SaveFailed) -> None:
        """Act on a save that was committed or failed. Called on rank 0 only, so that no callback may communicate."""

    def on_evaluation(self, evaluated: Evaluated) -> None:
        """Act on an evaluation. Losses are equal on all ranks; metrics of the user's function are this rank's own."""

    def on_end(self, progress: TrainingProgress) -> None:
        """Act on the end of training, once the last checkpoint is committed. Not called when a run fails."""


_METHODS = ("before_step", "after_step", "on_checkpoint", "on_evaluation", "on_end")


class Callbacks:
    """The callbacks of a run, called in the order of registration."""

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self._overriding: dict[str, list[Callback]] = {method: [] for method in _METHODS}
        """Callbacks that override a method: the others cost nothing."""
        self._guard = CollectiveGuard()
        for callback in callbacks:
            self.add(callback)

    def add(self, callback: Callback) -> None:
        """Register a callback behind those registered before."""
        for method in _METHODS:
            if getattr(type(callback), method) is not getattr(Callback, method):
                self._overriding[method].append(callback)

    def before_step(self, step: int) -> None:
        """Call `before_step` of all callbacks."""
        self._call(self._overriding["before_step"], lambda callback: callback.before_step(step))

    def after_step(self, completed: CompletedStep, *, collective: bool) -> None:
        """Call `after_step` of the callbacks that are collective, or of those that are not."""
        callbacks = [one for one in self._overriding["after_step"] if one.collective == collective]
        self._call(callbacks, lambda callback: callback.after_step(completed))

    def on_checkpoint(self, outcome: Saved | SaveFailed) -> None:
        """Call `on_checkpoint` of all callbacks."""
        with self._guard:  # Rank 0 is alone here, so that no callback may communicate.
            for callback in self._overriding["on_checkpoint"]:
                self._guard.callback = type(callback).__name__
                callback.on_checkpoint(outcome)

    def on_evaluation(self, evaluated: Evaluated) -> None:
        """Call `on_evaluation` of all callbacks."""
        self._call(self._overriding["on_evaluation"], lambda callback: callback.on_evaluation(evaluated))

    def on_end(self, progress: TrainingProgress) -> None:
        """Call `on_end` of all callbacks."""
        self._call(self._overriding["on_end"], lambda callback: callback.on_end(progress))

    def _call(self, callbacks: Sequence[Callback], method: Callable[[Callback], None]) -> None:
        """Call a method; consecutive callbacks that are not collective share one guard."""
        for collective, group in groupby(callbacks, key=lambda callback: callback.collective):
            with nullcontext() if collective else self._guard:
                for callback in group:
                    self._guard.callback = type(callback).__name__
                    method(callback)


class CollectiveGuard(TorchDispatchMode):
    """Makes collectives that this thread calls inside raise UndeclaredCollective. Other threads are not affected."""

    callback = ""
    """Name of the callback that is running."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse the operators behind torch.distributed; run all others."""
        if func.namespace in COLLECTIVE_NAMESPACES:
            raise UndeclaredCollective(
                f"callback {self.callback} calls {func}, a collective, where it may not: set `collective = True` in "
                "the class and call the same collectives on all ranks; on_checkpoint runs on rank 0 and never may"
            )
        return func(*args, **(kwargs or {}))
