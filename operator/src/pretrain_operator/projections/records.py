"""What becomes a line of a run's files: the reports of ranks, with who made them and when."""

from __future__ import annotations

from pretrain_api.messages.reports import Evaluated, Sampled, StepDone
from pretrain_api.status.records import EvaluationRecord, SampleRecord, StepRecord


def step_record(body: StepDone, generation: int, time: float, workers: int, devices: int | None) -> StepRecord:
    """The line of `metrics.jsonl` of a step; `devices`: training processes, None where that is not known."""
    memory = body.memory
    return StepRecord(
        **body.model_dump(exclude={"kind", "loss_contribution", "memory"}),
        generation=generation,
        workers=workers,
        time=time,
        tokens_per_second_per_device=body.tokens_per_second / devices if devices else None,
        memory_bytes=memory.bytes if memory else None,
        memory_peak_bytes=memory.peak_bytes if memory else None,
        memory_reserved_bytes=memory.reserved_bytes if memory else None,
        alloc_retries=memory.alloc_retries if memory else 0,
    )


def evaluation_record(body: Evaluated, generation: int, time: float) -> EvaluationRecord:
    """The line of `evaluations.jsonl`."""
    return EvaluationRecord(**body.model_dump(exclude={"kind"}), generation=generation, time=time)


def sample_record(body: Sampled, generation: int, time: float) -> SampleRecord:
    """The line of `samples.jsonl`."""
    return SampleRecord(**body.model_dump(exclude={"kind"}), generation=generation, time=time)
