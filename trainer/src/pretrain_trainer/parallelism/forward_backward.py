"""How a replica of the model takes its micro-batches: forward and backward of each in turn, on one process or more.

A pipeline takes them in another order, see `pipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain_trainer.parallelism.gradients import Gradients


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that are computed together."""

    windows: Tensor
    """(sequences, context + 1) tokens."""
    weight: float
    """Of its summed loss in the step's; 0: it is computed for the sake of collectives."""
    seed: int | None = None
    """Of its dropout; None: there is none."""


class Loss(Protocol):
    """The summed loss of windows (batch, context + 1) by the model, or by its last stage from `hidden`."""

    def __call__(
        self, model: nn.Module, windows: Tensor, hidden: Tensor | None = None, seed: int | None = None
    ) -> Tensor:
        """A scalar. `seed`: of dropout."""
        ...


class Passes(Protocol):
    """What is done with the model. Ranks of one replica call the same at the same time."""

    def accumulate(self, work: Sequence[MicroBatch], gradients: Gradients) -> None:
        """Forward and backward of a step's micro-batches of this replica, into the gradients."""
        ...

    def loss(self, windows: Tensor) -> Tensor:
        """The summed loss of windows; anything on ranks whose place does not count."""
        ...

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Logits (rows) of the token after these (time), on all ranks of the replica."""
        ...


class InTurn:
    """One micro-batch after the other. Each of `parts` tensor ranks has as much of a sequence."""

    def __init__(self, model: nn.Module, loss: Loss, device: torch.device, parts: int = 1) -> None:
        self._model = model
        self._loss = loss
        self._device = device
        self._parts = parts

    def accumulate(self, work: Sequence[MicroBatch], gradients: Gradients) -> None:
        """See Passes."""
        for index, batch in enumerate(work, 1):
            loss = self._loss(self._model, batch.windows.to(self._device), seed=batch.seed) * batch.weight
            gradients.add(loss, last=index == len(work))

    def loss(self, windows: Tensor) -> Tensor:
        """See Passes."""
        return self._loss(self._model, windows.to(self._device))

    def next_logits(self, tokens: Tensor) -> Tensor:
        """See Passes."""
        return self._model(padded(tokens, self._parts).to(self._device))[0, len(tokens) - 1]


def padded(tokens: Tensor, parts: int) -> Tensor:
    """Tokens (1, time) that can be cut into so many equal parts; what is behind a token does not change its logits."""
    return functional.pad(tokens, (0, -len(tokens) % parts))[None]
