"""A run's metrics for TensorBoard, from the stream that `metrics.jsonl` is written from: no rank knows of it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from pretrain_api.status.records import Appraisal, SampleRecord, StepRecord
from pretrain_api.status.step_parts import parts_of
from pretrain_cli.errors import BadInput

FOLDER = "tensorboard"
FLUSH_SECONDS = 5


class TensorBoard:
    """Writes event files into a folder; a context manager. Raises BadInput as `require` does.

    A step that is done again after a fault appears again, as in `metrics.jsonl`: TensorBoard shows the last one.
    """

    def __init__(self, folder: Path) -> None:
        self._writer: Any = _package().SummaryWriter(str(folder), flush_secs=FLUSH_SECONDS)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def step(self, record: StepRecord) -> None:
        """A step was done."""
        for tag, value in scalars(record).items():
            self._writer.add_scalar(tag, value, record.step, walltime=record.time)

    def appraisal(self, record: Appraisal) -> None:
        """The model was evaluated or wrote a text."""
        if isinstance(record, SampleRecord):
            text = record.prompt + record.text
            self._writer.add_text(f"sample/{record.number}", text, record.step, walltime=record.time)
            return
        for source, loss in record.losses.items():
            self._writer.add_scalar(f"validation/{source}", loss, record.step, walltime=record.time)
        for name, value in record.metrics.items():
            self._writer.add_scalar(f"evaluation/{name}", value, record.step, walltime=record.time)


def require() -> None:
    """Raise BadInput when the package is not installed."""
    _package()


def _package() -> Any:
    try:
        return importlib.import_module("tensorboardX")
    except ImportError as error:
        raise BadInput("--tensorboard needs the package tensorboardX: install it, or leave the flag out") from error


def scalars(record: StepRecord) -> dict[str, float]:
    """What a step says, by TensorBoard's tags; what is not known is left out."""
    known: dict[str, float | None] = {
        "train/loss": record.loss,
        "train/gradient_norm": record.grad_norm,
        "train/learning_rate": record.learning_rate,
        "train/tokens": record.tokens,
        "speed/tokens_per_second": record.tokens_per_second,
        "speed/tokens_per_second_per_device": record.tokens_per_second_per_device,
        "speed/mfu": record.mfu,
        "memory/bytes": record.memory_bytes,
        "memory/peak_bytes": record.memory_peak_bytes,
        "memory/reserved_bytes": record.memory_reserved_bytes,
        "run/workers": record.workers,
        "run/generation": record.generation,
        **{f"step_seconds/{part}": seconds for part, seconds in parts_of(record).items()},
    }
    return {tag: value for tag, value in known.items() if value is not None}
