"""One-line texts of evaluations and samples."""

from __future__ import annotations

from pretrain_api.status.records import EvaluationResult, SampleRecord

TEXT_LENGTH = 160
"""Maximum characters of a sample in a line; `samples.jsonl` has the whole text."""


def evaluation_title(record: EvaluationResult) -> str:
    """Return the title of a result, to be followed by the step."""
    return "sample after" if isinstance(record, SampleRecord) else "evaluation after"


def evaluation_text(record: EvaluationResult) -> str:
    """Format a result without line breaks."""
    if isinstance(record, SampleRecord):
        text = " ".join((record.prompt + record.text).split())
        return text if len(text) <= TEXT_LENGTH else text[: TEXT_LENGTH - 1] + "…"
    parts = [f"{source} {loss:.4f}" for source, loss in record.losses.items()]
    parts += [f"{name} {value:.4g}" for name, value in record.metrics.items()]
    return ", ".join(parts)
