"""`--fault ACTION:TARGET=N,step=S`: requested faults, parsed and checked before the run starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from pretrain_cli.errors import BadInput

FaultAction = Literal["kill", "stop", "term", "remove", "add", "nan"]
FaultTarget = Literal["worker", "rank", "agent", "coordinator", "data"]

TARGETS: dict[FaultAction, tuple[FaultTarget, ...]] = {
    "kill": ("worker", "rank", "agent", "coordinator"),
    "stop": ("worker",),
    "term": ("worker",),
    "remove": ("worker",),
    "add": ("worker",),
    "nan": ("data",),
}
DEFAULT_TARGETS: dict[str, FaultTarget] = {"add": "worker", "remove": "worker", "nan": "data"}
"""Target of an action when none is given."""
UNNUMBERED: tuple[FaultTarget, ...] = ("coordinator", "data")
"""Targets without a number."""
_SPEC = re.compile(r"(?P<action>\w+):((?P<target>\w*)(=(?P<number>[^,]*))?,)?\s*step=(?P<step>[^,]*)")


class BadFault(BadInput):
    """Invalid fault; the message names it and says what is allowed."""


@dataclass(frozen=True)
class Fault:
    """Fault to inject once the job has done `step`; `number` is a worker's slot or a global rank.

    `add` and `remove` change the desired number of workers by one and ignore the number: the highest slot comes or
    goes. `nan` is in the data of `step`: if a rollback skips that data, the fault is gone.
    """

    action: FaultAction
    target: FaultTarget
    number: int | None
    step: int
    text: str

    @property
    def replicas(self) -> int:
        """Change of the desired number of workers."""
        return {"add": 1, "remove": -1}.get(self.action, 0)

    @property
    def due(self) -> int:
        """Step after which the fault is injected."""
        return self.step - 1 if self.action == "nan" else self.step


def parse_fault(text: str) -> Fault:
    """Parse a fault, for example `kill:worker=1,step=60`. Raises BadFault."""
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise BadFault(f"--fault {text}: write ACTION:TARGET=N,step=S, for example kill:worker=1,step=60")
    action = cast(FaultAction, match["action"])
    if action not in TARGETS:
        raise BadFault(f"--fault {text}: unknown action {action!r}; use one of {', '.join(TARGETS)}")
    target = cast(FaultTarget, match["target"] or DEFAULT_TARGETS.get(action, ""))
    if target not in TARGETS[action]:
        raise BadFault(f"--fault {text}: {action} needs one of {', '.join(f'{action}:{t}' for t in TARGETS[action])}")
    number = _natural(text, target, match["number"]) if match["number"] is not None else None
    if target in UNNUMBERED and number is not None:
        raise BadFault(f"--fault {text}: {target} takes no number; write {action}:{target},step=S")
    if number is None and action in ("kill", "stop", "term") and target not in UNNUMBERED:
        raise BadFault(f"--fault {text}: name the {target}, for example {action}:{target}=1,step={match['step']}")
    step = _natural(text, "step", match["step"])
    if step < 1:
        raise BadFault(f"--fault {text}: step counts completed steps, from 1")
    return Fault(action, target, number, step, text.strip())


@dataclass(frozen=True)
class FaultPlan:
    """Checked faults in the order of their steps, and the range of desired workers they cause."""

    faults: tuple[Fault, ...]
    fewest: int
    most: int


def plan_faults(
    faults: Sequence[Fault], replicas: int, processes: int, total_steps: int, quantum: int = 1
) -> FaultPlan:
    """Check faults against a job that starts with `replicas` workers, which come in multiples of `quantum`.

    Raises BadFault for a fault that cannot happen.
    """
    ordered = tuple(sorted(faults, key=lambda fault: fault.step))
    wanted = fewest = most = replicas
    for fault, following in zip(ordered, (*ordered, None)[1:], strict=True):
        if fault.step >= total_steps:
            raise BadFault(
                f"--fault {fault.text}: step must be below {total_steps}, the job's last step: lower it or train longer"
            )
        wanted += fault.replicas
        fewest, most = min(fewest, wanted), max(most, wanted)
        if wanted < 1:
            raise BadFault(f"--fault {fault.text}: it would leave no worker: start with more, or remove fewer")
        if (following is None or following.step > fault.step) and (wanted - replicas) % quantum:
            raise BadFault(
                f"--fault {fault.text}: workers come in multiples of {quantum} here, not {wanted}: "
                f"give it {quantum} times with the same step"
            )
        there = most * (processes if fault.target == "rank" else 1)
        if fault.replicas == 0 and fault.number is not None and fault.number >= there:
            raise BadFault(
                f"--fault {fault.text}: there is no {fault.target} {fault.number} at that step: use 0 to {there - 1}"
            )
    return FaultPlan(ordered, fewest, most)


def _natural(text: str, name: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", value.strip()):
        raise BadFault(f"--fault {text}: {name} must be a whole number from 0, not {value!r}")
    return int(value)
