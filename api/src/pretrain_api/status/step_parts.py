"""The parts of a step's time."""

from __future__ import annotations

from pretrain_api.messages.reports import Progress, StepDone
from pretrain_api.status.records import StepRecord

STEP_PARTS: tuple[str, ...] = ("data", "compute", "reduce", "optimizer", "stall", "other")
"""Waiting for data; forward and backward; until the sums of all ranks are there; the update; held up by the save
before; the rest."""


def parts_of(step: StepDone | Progress | StepRecord) -> dict[str, float]:
    """Seconds by part, in the order of STEP_PARTS. They add up to the step's time, unless its parts overlap."""
    named = (
        step.data_seconds, step.compute_seconds, step.reduce_seconds, step.optimizer_seconds, step.stall_seconds,
    )  # fmt: skip
    return dict(zip(STEP_PARTS, (*named, max(0.0, step.seconds - sum(named))), strict=True))
