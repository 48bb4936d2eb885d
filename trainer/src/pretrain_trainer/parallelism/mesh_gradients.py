"""Gradients of a model partitioned over a mesh: shards, copies of shards, parts of matrices, pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pretrain_trainer.core.errors import CollectiveFailed
from pretrain_trainer.parallelism.gradients import Reduced, Signals
from pretrain_trainer.parallelism.parallelize import REPLICATE, Groups


class MeshGradients:
    """Gradients of each rank's own parts. FSDP2 sums them in backward; without it copies are summed here.

    The norm is that of the whole model's gradient: each rank adds the squares of its parts, divided by the number of
    ranks with the same parts. Loss, signals and squares share one small reduction over all ranks.
    """

    def __init__(self, model: nn.Module, groups: Groups) -> None:
        self.padded = groups.sharded
        self._root = model if isinstance(model, FSDPModule) else None
        self._parameters = list(model.parameters())
        self._counts = groups.place.counts
        self._copies = None if groups.sharded else groups.group(REPLICATE)
        self._ends = groups.ends
        self._tied = [at for at, (name, _) in enumerate(model.named_parameters()) if name == "token_embedding.weight"]
        holders = [groups.holders(name, parameter) for name, parameter in model.named_parameters()]
        device = self._parameters[0].device
        self._shares = torch.tensor(holders, dtype=torch.float64, device=device).reciprocal()
        self._loss = torch.zeros((), dtype=torch.float64, device=device)

    def begin(self) -> None:
        """Drop the last step's gradients; `model.zero_grad` would miss those of the root."""
        for parameter in self._parameters:
            parameter.grad = None
        self._loss.zero_()

    def add(self, loss: Tensor, last: bool) -> None:
        """Count the loss on one rank of the replica, and run backward from it."""
        if self._counts:
            self._loss += loss.detach()
        self.backward(loss, None, last)

    def backward(self, output: Tensor, gradient: Tensor | None, last: bool) -> None:
        """Run backward from a stage's output with its gradient; FSDP2 reduces over the ranks with the `last` one."""
        if self._root is not None:
            self._root.set_is_last_backward(last)
            self._root.set_requires_gradient_sync(last)
        torch.autograd.backward(output, gradient)

    def reduce(self, signals: Signals, clip: float | None) -> Reduced:
        """Sum the gradients not summed yet, and clip to a norm over the whole mesh."""
        gradients = [self._settled(parameter) for parameter in self._parameters]
        try:
            if self._copies is not None:
                _sum_together(gradients, self._copies)
            if self._ends is not None:
                _sum_together([gradients[at] for at in self._tied], self._ends)
            norms = torch.stack(cast("Any", torch)._foreach_norm(gradients)).double()
            tail = torch.stack((self._loss, (norms.square() * self._shares).sum(), *self._flags(signals)))
            dist.all_reduce(tail)
        except RuntimeError as error:
            raise CollectiveFailed(str(error)) from error
        own = float(self._loss)
        loss, squares, command, save = tail.tolist()
        norm = squares**0.5
        if clip is not None and norm > clip:
            cast("Any", torch)._foreach_mul_(gradients, clip / (norm + 1e-6))
        return Reduced(loss, norm, Signals(command > 0, save > 0), own)

    def _settled(self, parameter: nn.Parameter) -> Tensor:
        """Return this rank's part of the gradient, laid out as the parameter.

        The gradient of a norm, of which each tensor rank has a share, is summed over the tensor ranks.
        """
        if parameter.grad is None:  # a rank without micro-batches, without FSDP2
            parameter.grad = torch.zeros_like(parameter)
        if not isinstance(parameter.grad, DTensor):
            return parameter.grad
        if parameter.grad.placements != parameter.placements:  # pyright: ignore[reportAttributeAccessIssue]
            parameter.grad = parameter.grad.redistribute(placements=parameter.placements)  # pyright: ignore
        return cast(DTensor, parameter.grad).to_local()

    def _flags(self, signals: Signals) -> tuple[Tensor, Tensor]:
        zero = torch.zeros_like(self._loss)
        return zero + signals.command, zero + signals.save


def _sum_together(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum each tensor over the group, in one all-reduce."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))
