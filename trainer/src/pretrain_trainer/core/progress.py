"""Progress of training: all of its state that is not a tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from pretrain_api.checkpoint.lineage import LossMemory, Manifest, SlowedRange, StepRange
from pretrain_api.messages.reports import StepDone


@dataclass(frozen=True)
class TrainingProgress:
    """State after `step` steps on `tokens` tokens."""

    step: int = 0
    tokens: int = 0
    skipped: tuple[StepRange, ...] = ()
    """Skipped ranges of data."""
    slowed: tuple[SlowedRange, ...] = ()
    """Ranges of steps with a lower learning rate."""
    dropped: tuple[StepRange, ...] = ()
    """Ranges of steps whose update was dropped."""
    watch: LossMemory = field(default_factory=LossMemory)
    lately: tuple[StepDone, ...] = ()
    """Reports of the last steps, on all ranks: the worker that sends them may be lost before it has."""

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Return the progress that a checkpoint records."""
        return cls(manifest.step, manifest.tokens, manifest.skipped, manifest.slowed, manifest.dropped, manifest.watch)
