"""Records of a run, one line each: `metrics.jsonl`, `evaluations.jsonl`, `samples.jsonl`."""

from __future__ import annotations

import math

from pydantic import Field

from pretrain_api.base import Frozen


def perplexity(loss: float) -> float:
    """Of a loss in nats per token: a model that chose among so many equally likely tokens would have it."""
    return math.exp(loss) if loss < 700 else math.inf


class StepRecord(Frozen):
    """A line of `metrics.jsonl`. A step done again appears again with a higher generation; the last one counts."""

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
    mfu: float | None = Field(default=None, description="Share of the devices' peak; null: it is not known")
    seconds: float = Field(default=0.0, description="Duration of the step as rank 0 saw it")
    data_seconds: float = Field(default=0.0, description="Of which waiting for data")
    compute_seconds: float = Field(default=0.0, description="Of which forward and backward")
    reduce_seconds: float = Field(default=0.0, description="Of which until the sums of all ranks were there")
    optimizer_seconds: float = Field(default=0.0, description="Of which the update")
    stall_seconds: float = Field(default=0.0, description="Of which held up by the save before it")
    memory_bytes: int | None = Field(default=None, description="Rank 0's: of its accelerator, else of its process")
    memory_peak_bytes: int | None = None
    memory_reserved_bytes: int | None = Field(default=None, description="Held by the accelerator's allocator")
    alloc_retries: int = Field(default=0, description="Allocations of rank 0 that had to be tried again")


class EvaluationRecord(Frozen):
    """A line of `evaluations.jsonl`. Of a step that was done again it appears again, as in `metrics.jsonl`."""

    step: int
    losses: dict[str, float] = Field(description="Validation losses by source, in nats per token")
    metrics: dict[str, float] = Field(
        default_factory=dict[str, float], description="What `training.evaluation.hook` returned"
    )
    problem: str = Field(default="", description="Why that returned nothing of use")
    seconds: float
    generation: int
    time: float = Field(description="Unix seconds")


class SampleRecord(Frozen):
    """A line of `samples.jsonl`, likewise."""

    step: int
    number: int = Field(default=0, description="Among the texts of this step, from 0")
    prompt: str
    text: str = Field(description="What the model wrote after the prompt")
    generation: int
    time: float = Field(description="Unix seconds")


Appraisal = EvaluationRecord | SampleRecord


"""What was found out about the model between two steps."""
