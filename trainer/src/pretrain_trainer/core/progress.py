"""How far training has come: all of its state that is not a tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from pretrain_api.checkpoint.lineage import LossMemory, Manifest, SlowedRange, StepRange
from pretrain_api.messages.reports import StepDone


@dataclass(frozen=True)
class Progress:
    """`step` completed steps on `tokens` tokens. `skipped` are ranges of data that are passed over, `slowed` ranges of
    steps with a lower learning rate, `dropped` those of steps whose update was not made. `lately` has the last steps'
    reports, which all ranks know: the worker that has to tell them can be lost before it has."""

    step: int = 0
    tokens: int = 0
    skipped: tuple[StepRange, ...] = ()
    slowed: tuple[SlowedRange, ...] = ()
    dropped: tuple[StepRange, ...] = ()
    watch: LossMemory = field(default_factory=LossMemory)
    lately: tuple[StepDone, ...] = ()

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """That of a checkpoint."""
        return cls(manifest.step, manifest.tokens, manifest.skipped, manifest.slowed, manifest.dropped, manifest.watch)
