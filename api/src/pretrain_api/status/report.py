"""Final report of a run: `report.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain_api.base import Frozen
from pretrain_api.checkpoint.lineage import StepRange
from pretrain_api.status.job import CheckpointSummary, GenerationSummary, Goodput, Incident


class RunReport(Frozen):
    """Contents of `report.json`. Losses are in nats per token, unrounded."""

    job: str
    result: Literal["Succeeded", "Failed", "Stopped"]
    reason: str
    steps: int
    tokens: int
    final_loss: float | None = Field(description="Mean of the last 20 steps")
    unigram_loss: float | None
    validation_loss: dict[str, float]
    evaluation_metrics: dict[str, float] = Field(default_factory=dict[str, float])
    tokens_per_second: float | None
    tokens_per_second_per_device: float | None = None
    mfu: float | None = None
    step_seconds: dict[str, float] = Field(
        default_factory=dict[str, float], description="Mean seconds of a step by part, on rank 0"
    )
    wall_seconds: float
    goodput: Goodput
    generations: tuple[GenerationSummary, ...]
    incidents: tuple[Incident, ...]
    checkpoints: CheckpointSummary
    skipped: tuple[StepRange, ...] = ()
    rollbacks: int = 0
