"""Forward and backward passes of a replica's micro-batches, and the division of micro-batches among replicas.

A pipeline orders them differently, see `pipeline`.
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
    """Sequences computed together."""

    windows: Tensor
    """(sequences, context + 1) tokens."""
    weight: float
    """Factor of its summed loss in the step's loss; 0: computed only because collectives need it."""
    seed: int | None = None
    """Seed of its dropout; None: no dropout."""


class LossFunction(Protocol):
    """Summed loss of windows (batch, context + 1) by the model, or by its last stage from `hidden`."""

    def __call__(
        self, model: nn.Module, windows: Tensor, hidden: Tensor | None = None, seed: int | None = None
    ) -> Tensor:
        """Return a scalar. `seed`: of dropout."""
        ...


class Passes(Protocol):
    """Forward and backward passes of a replica. Its ranks call the same methods at the same time."""

    def accumulate(self, work: Sequence[MicroBatch], gradients: Gradients) -> None:
        """Run forward and backward of this replica's micro-batches of a step, into the gradients."""
        ...

    def loss(self, windows: Tensor) -> Tensor:
        """Return the summed loss of windows; undefined on ranks whose position does not count."""
        ...

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Return the logits (rows) of the token after these (time), on all ranks of the replica."""
        ...


class SequentialPasses:
    """Passes of one micro-batch after the other. Each of `parts` tensor ranks has an equal part of a sequence."""

    def __init__(self, model: nn.Module, loss: LossFunction, device: torch.device, parts: int = 1) -> None:
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
    """Pad tokens to (1, time) divisible by `parts`; tokens after a position do not change its logits."""
    return functional.pad(tokens, (0, -len(tokens) % parts))[None]


def share(total: int, rank: int, world_size: int) -> range:
    """Return this rank's micro-batches of 0..total-1; the first ranks may have one more."""
    base, more = divmod(total, world_size)
    first = rank * base + min(rank, more)
    return range(first, first + base + (rank < more))


def largest_share(total: int, world_size: int) -> int:
    """Return the most micro-batches of any rank: with collectives in forward and backward, all ranks run as many."""
    return -(-total // world_size)
