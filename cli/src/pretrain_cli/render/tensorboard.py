"""TensorBoard event files of a run, written from the stream behind `metrics.jsonl`, not by ranks."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from pretrain_api.status.records import EvaluationResult, SampleRecord, StepRecord, parts_of
from pretrain_cli.errors import BadInput

FOLDER = "tensorboard"
FLUSH_SECONDS = 5


class TensorBoardWriter:
    """Context manager that writes event files to a folder. Raises BadInput as `require_tensorboard` does.

    A repeated step appears again, as in `metrics.jsonl`: TensorBoard shows the last one.
    """

    def __init__(self, folder: Path) -> None:
        self._writer: Any = _package().SummaryWriter(str(folder), flush_secs=FLUSH_SECONDS)

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def step(self, record: StepRecord) -> None:
        """Write a step's metrics."""
        for tag, value in scalars(record).items():
            self._writer.add_scalar(tag, value, record.step, walltime=record.time)

    def evaluation(self, record: EvaluationResult) -> None:
        """Write an evaluation or a sample."""
        if isinstance(record, SampleRecord):
            text = record.prompt + record.text
            self._writer.add_text(f"sample/{record.number}", text, record.step, walltime=record.time)
            return
        for source, loss in record.losses.items():
            self._writer.add_scalar(f"validation/{source}", loss, record.step, walltime=record.time)
        for name, value in record.metrics.items():
            self._writer.add_scalar(f"evaluation/{name}", value, record.step, walltime=record.time)


def require_tensorboard() -> None:
    """Raise BadInput if the package is not installed."""
    _package()


def _package() -> Any:
    try:
        return importlib.import_module("tensorboardX")
    except ImportError as error:
        raise BadInput("--tensorboard needs the package tensorboardX: install it, or omit the flag") from error


def scalars(record: StepRecord) -> dict[str, float]:
    """Return a step's metrics by TensorBoard tag; unknown values are omitted."""
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
