"""Validation loss on held-out sources: the same value at any world size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain_trainer.core.errors import CollectiveFailed
from pretrain_trainer.core.ranks import Ranks
from pretrain_trainer.datasets.corpus import TokenSource, read_windows
from pretrain_trainer.parallelism.forward_backward import largest_share, share


@dataclass(frozen=True)
class HeldOut:
    """The first windows of a source as micro-batches; the last may be smaller."""

    name: str
    micro_batches: tuple[Tensor, ...]

    @property
    def targets(self) -> int:
        """Number of tokens predicted."""
        return sum(batch.shape[0] * (batch.shape[1] - 1) for batch in self.micro_batches)


def read_held_out(
    sources: Sequence[TokenSource], sequences: int, micro_batch: int, context: int
) -> tuple[HeldOut, ...]:
    """Read the first `sequences` windows of each source, or all where there are fewer."""
    held_out = []
    for source in sources:
        windows = read_windows(source, np.arange(min(sequences, source.windows)), context)
        held_out.append(HeldOut(source.name, torch.from_numpy(windows).split(micro_batch)))
    return tuple(held_out)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode: no dropout, no gradients."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


def evaluate(
    loss: Callable[[Tensor], Tensor], held_out: Sequence[HeldOut], ranks: Ranks, padded: bool
) -> dict[str, float]:
    """Return the mean loss in nats per token by source, of a model in evaluation mode. Collective.

    Every micro-batch's loss has an element of its own in the reduced vector, zero on the other ranks, and the elements
    are summed in a fixed order: the result is bit-equal at any number of replicas. With `padded` all ranks run the
    model equally often, as FSDP needs.
    """
    batches = [batch for source in held_out for batch in source.micro_batches]
    losses = torch.zeros(len(batches), dtype=torch.float64, device=ranks.device)
    place = ranks.place
    mine = share(len(batches), place.replica, place.replicas)
    for index in mine:
        summed = loss(batches[index])
        if place.counts:
            losses[index] = summed.double()
    for _ in range(largest_share(len(batches), place.replicas) - len(mine) if padded else 0):
        loss(batches[0])
    try:
        dist.all_reduce(losses)
    except RuntimeError as error:
        raise CollectiveFailed(str(error)) from error
    parts = iter(losses.tolist())
    return {source.name: sum(next(parts) for _ in source.micro_batches) / source.targets for source in held_out}
