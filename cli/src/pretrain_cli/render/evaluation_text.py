"""What was found out about the model between two steps, in a line."""

from __future__ import annotations

from pretrain_api.status.records import Appraisal, SampleRecord

TEXT_LENGTH = 160
"""Characters of a text that a line shows; `samples.jsonl` has all of them."""


def appraisal_title(record: Appraisal) -> str:
    """What it is, before the step."""
    return "sample after" if isinstance(record, SampleRecord) else "evaluation after"


def appraisal_text(record: Appraisal) -> str:
    """What came of it, without line breaks."""
    if isinstance(record, SampleRecord):
        text = " ".join((record.prompt + record.text).split())
        return text if len(text) <= TEXT_LENGTH else text[: TEXT_LENGTH - 1] + "…"
    parts = [f"{source} {loss:.4f}" for source, loss in record.losses.items()]
    parts += [f"{name} {value:.4g}" for name, value in record.metrics.items()]
    return ", ".join(parts)
