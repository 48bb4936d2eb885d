"""How far training has come: all of its state that is not a tensor."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain_api.lineage import StepRange


@dataclass(frozen=True)
class Progress:
    """`step` completed optimizer updates on `tokens` tokens; `skipped` are the ranges of data passed over."""

    step: int = 0
    tokens: int = 0
    skipped: tuple[StepRange, ...] = ()
