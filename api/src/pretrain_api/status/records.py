"""Records of a run, one line each: `metrics.jsonl`, `evaluations.jsonl`, `samples.jsonl`."""

from __future__ import annotations

import math

from pydantic import Field

from pretrain_api.base import Frozen
from pretrain_api.messages.reports import Progress, StepDone

STEP_PARTS: tuple[str, ...] = ("data", "compute", "reduce", "optimizer", "stall", "other")
"""Data wait; forward and backward; all-reduce wait; optimizer update; checkpoint stall; the rest."""


def perplexity(loss: float) -> float:
    """Compute the perplexity of a loss in nats per token; infinite if it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


class StepRecord(Frozen):
    """Line of `metrics.jsonl`. A repeated step has a later line with a higher generation; the last line counts."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    generation: int
    workers: int
    time: float = Field(description="Unix seconds")
    tokens_per_second_per_device: float | None = None
    mfu: float | None = Field(default=None, description="Model FLOPs over the devices' peak; null: the peak is unknown")
    seconds: float = Field(default=0.0, description="Duration of the step on rank 0")
    data_seconds: float = Field(default=0.0, description="Data wait within the step")
    compute_seconds: float = Field(default=0.0, description="Forward and backward within the step")
    reduce_seconds: float = Field(default=0.0, description="All-reduce wait within the step")
    optimizer_seconds: float = Field(default=0.0, description="Optimizer update within the step")
    stall_seconds: float = Field(default=0.0, description="Checkpoint stall within the step")
    memory_bytes: int | None = Field(
        default=None, description="Memory of rank 0: of its accelerator, or else of its process"
    )
    memory_peak_bytes: int | None = None
    memory_reserved_bytes: int | None = Field(default=None, description="Bytes held by the accelerator's allocator")
    alloc_retries: int = Field(default=0, description="Retried allocations of rank 0")


def parts_of(step: StepDone | Progress | StepRecord) -> dict[str, float]:
    """Return seconds by part, in the order of STEP_PARTS. They add up to the step's time unless parts overlap."""
    named = (
        step.data_seconds, step.compute_seconds, step.reduce_seconds, step.optimizer_seconds, step.stall_seconds,
    )  # fmt: skip
    return dict(zip(STEP_PARTS, (*named, max(0.0, step.seconds - sum(named))), strict=True))


class EvaluationRecord(Frozen):
    """Line of `evaluations.jsonl`. A repeated step has a later line, as in `metrics.jsonl`."""

    step: int
    losses: dict[str, float] = Field(description="Validation losses by source, in nats per token")
    metrics: dict[str, float] = Field(
        default_factory=dict[str, float], description="Results of `training.evaluation.hook`"
    )
    problem: str = Field(default="", description="Error of the hook; empty: no error, or no hook")
    seconds: float
    generation: int
    time: float = Field(description="Unix seconds")


class SampleRecord(Frozen):
    """Line of `samples.jsonl`, likewise."""

    step: int
    number: int = Field(default=0, description="Index among the texts of this step, from 0")
    prompt: str
    text: str = Field(description="Generated text after the prompt")
    generation: int
    time: float = Field(description="Unix seconds")


EvaluationResult = EvaluationRecord | SampleRecord
"""Result of an evaluation or of sampling between two steps."""
