"""Projection of evaluations: validation losses, metrics of the user's hook, texts of the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pretrain_api.messages.reports import Evaluated, Plateau, Sampled
from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import EvaluationRecord, SampleRecord
from pretrain_operator.cluster import Event
from pretrain_operator.projections.projection import Context, Effects, Projection, on

SAMPLE_LENGTH = 4000
"""Characters of the model's texts that are kept in the status: it must fit into an object of the API server."""
BETWEEN_SAMPLES = "\n\n"


@dataclass(frozen=True)
class EvaluationSlice:
    """Slice of the status: evaluations."""

    validation_loss: dict[str, float]
    evaluation_metrics: dict[str, float]
    sample: str
    """Texts of the last step that had some, prompts included."""
    from_status: bool = False
    """An earlier operator took in the texts, which may be replayed."""


Folded = tuple[EvaluationSlice, Effects]


def restore(status: JobStatus) -> EvaluationSlice:
    """Read the slice."""
    return EvaluationSlice(status.validation_loss, status.evaluation_metrics, status.sample, from_status=True)


def write(slice_: EvaluationSlice, status: JobStatus) -> JobStatus:
    """Return the status with the slice in it."""
    return status.model_copy(
        update={
            "validation_loss": slice_.validation_loss,
            "evaluation_metrics": slice_.evaluation_metrics,
            "sample": slice_.sample,
        }
    )


def evaluated(slice_: EvaluationSlice, body: Evaluated, context: Context) -> Folded:
    """Replace losses and metrics, and report a hook that raised."""
    record = EvaluationRecord(**body.model_dump(exclude={"kind"}), generation=context.number, time=context.time)
    failed = Event("Warning", "EvaluationHookFailed", f"step {body.step}: {body.problem}; training continues")
    changed = replace(slice_, validation_loss=body.losses, evaluation_metrics=body.metrics)
    return changed, Effects(events=(failed,) if body.problem else (), evaluations=(record,))


def sampled(slice_: EvaluationSlice, body: Sampled, context: Context) -> Folded:
    """Append a text to those of the same step; the first one of a step replaces the step before."""
    record = SampleRecord(**body.model_dump(exclude={"kind"}), generation=context.number, time=context.time)
    text = body.prompt + body.text
    replayed = slice_.from_status and BETWEEN_SAMPLES + text + BETWEEN_SAMPLES in slice_.sample + BETWEEN_SAMPLES
    if body.number:
        text = slice_.sample if replayed else slice_.sample + BETWEEN_SAMPLES + text
    cut = text if len(text) <= SAMPLE_LENGTH else text[:SAMPLE_LENGTH] + "…"
    changed = replace(slice_, sample=cut, from_status=replayed and body.number > 0)
    return changed, Effects(evaluations=(record,))


def plateau(slice_: EvaluationSlice, body: Plateau, _: Context) -> Folded:
    """Report a loss that stopped falling."""
    text = f"step {body.step}: no mean loss below {body.lowest:.4f} for a long time"
    return slice_, Effects(events=(Event("Warning", "LossPlateau", text),))


EVALUATIONS = Projection(
    name="evaluations",
    restore=restore,
    write=write,
    rules=(on(Evaluated, evaluated), on(Sampled, sampled), on(Plateau, plateau)),
)
