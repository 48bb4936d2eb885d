"""Ports of a job's service: the coordinator that it controls, and the listener that it notifies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import EvaluationResult, StepRecord
from pretrain_operator.coordinator.types import CoordinatorView, Want
from pretrain_operator.decide.lifecycle import EndReason
from pretrain_operator.facts.fact import CoordinatorFact
from pretrain_operator.projections.projection import Measurement


class CoordinatorPort(Protocol):
    """One job's coordinator. `CoordinatorChannel` implements it."""

    def set_want(self, want: Want) -> None:
        """Set what the plan wants."""
        ...

    def view(self) -> CoordinatorView:
        """Return the coordinator's current state."""
        ...

    def on_facts(self, callback: Callable[[tuple[CoordinatorFact, ...]], None]) -> None:
        """Set the consumer of facts; reports are acknowledged after it returns."""
        ...

    def on_change(self, callback: Callable[[], None]) -> None:
        """Set the callback for changes of the view."""
        ...

    async def end(self, reason: EndReason, message: str) -> None:
        """Shut down all agents, also those that connect later."""
        ...


@dataclass(frozen=True)
class JobListener:
    """Callbacks of a job's service, for metrics and for the files of a local run."""

    began: Callable[[JobStatus], None] = lambda _: None
    """The service resumes from this status, as last written."""
    step: Callable[[StepRecord], None] = lambda _: None
    """A step was completed."""
    evaluation: Callable[[EvaluationResult], None] = lambda _: None
    """The model was evaluated or sampled."""
    measured: Callable[[tuple[Measurement, ...]], None] = lambda _: None
    """Numbers for Prometheus, each to be counted once."""
    reconciled: Callable[[JobStatus, float], None] = lambda status, seconds: None
    """A decision led to this status and took this number of seconds."""
