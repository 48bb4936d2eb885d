"""Reduction of gradients over micro-batches and ranks, together with the step's loss and signals.

A step's loss is the sum over all its targets divided by their number, so every micro-batch's loss arrives divided by
that and all reductions are plain sums: over micro-batches, then over ranks. Ranks without micro-batches add zero.

`FlatGradients` (plain data parallel) and `ShardedGradients` (FSDP2) share one protocol; `exact` has a variant of both
that is bit-equal at any world size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pretrain_trainer.core.errors import CollectiveFailed

BUCKET_BYTES = 25 << 20
"""As in DDP: large enough for a network's full speed, small enough that the first is complete early."""


@dataclass(frozen=True)
class Signals:
    """Flags that ranks share with a step's reduction: true on any rank means true for all."""

    command: bool = False
    save: bool = False


@dataclass(frozen=True)
class Reduced:
    """Result of a step's reduction, equal on all ranks. `norm` is that of the gradient before clipping."""

    loss: float
    norm: float
    signals: Signals
    contribution: float
    """The loss of this rank's micro-batches: the one field that differs between ranks."""
    note: str = ""
    """The reason why the result is not finite, if it is known."""

    @property
    def finite(self) -> bool:
        """True if loss and gradient are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Gradients(Protocol):
    """A step's gradients: `begin`, then `add` for each micro-batch, then `reduce`; then they are in `.grad`."""

    padded: bool
    """True if all ranks must add equally often: ranks with fewer micro-batches then add some of weight zero."""

    def begin(self) -> None:
        """Reset for the next step."""
        ...

    def add(self, loss: Tensor, last: bool) -> None:
        """Run backward of one micro-batch's part of the loss; `last` for this rank's last one of the step."""
        ...

    def reduce(self, signals: Signals, clip: float | None) -> Reduced:
        """Reduce over the ranks and clip to a global norm of `clip`. Raises CollectiveFailed."""
        ...


class FlatGradients:
    """Gradients of plain data parallel: all-reduces over buckets of one flat buffer that all `.grad` are views of.

    A step's first gradients are copied to the buffer as backward produces them, later ones are added: zeroing it would
    cost a noticeable part of a step of few tokens. The buffer has the parameters in reverse, about in backward's order.
    In the step's last backward each bucket is reduced as soon as it and those before it are complete, while backward
    continues; the last bucket includes the loss. So a small model has one reduction. Buckets and their order are the
    same in every process, so a restart is bit-equal (torch's DDP rebuilds its buckets after the first step). Make it
    after a restore: initialising the optimizer's state needs gradients that are None.
    """

    padded = False

    def __init__(self, parameters: Iterable[nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
        ordered = list(parameters)[::-1]
        self._flat, self._gradients, self._tail = flat_buffer(ordered, tail=3)
        buckets = _buckets([parameter.numel() for parameter in ordered], bucket_bytes // self._flat.element_size())
        *early, last = self._flat.split([*(sum(sizes) for sizes in buckets[:-1]), sum(buckets[-1]) + 3])
        self._early, self._last = early, last
        self._sizes = [len(bucket) for bucket in buckets]
        self._missing: list[int] = []
        self._launched: list[dist.Work] = []
        self._in_last_backward = False
        self._places = [(parameter, cast(Tensor, parameter.grad)) for parameter in ordered]
        members = iter(self._places)
        for number, size in enumerate(self._sizes):
            for parameter, place in islice(members, size):
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, number, place))

    def begin(self) -> None:
        """Drop the last step's gradients."""
        for parameter, _ in self._places:
            parameter.grad = None
        self._tail.zero_()
        self._missing = list(self._sizes)
        self._launched = []

    def add(self, loss: Tensor, last: bool) -> None:
        """Accumulate into the buffer."""
        self._in_last_backward = last
        loss.backward()
        self._in_last_backward = False
        self._tail[0] += loss.detach()

    def reduce(self, signals: Signals, clip: float | None) -> Reduced:
        """All-reduce the last bucket after those under way; waits for the device once, for the result."""
        set_signals(self._tail[1:], signals)
        own = self._tail[:1].clone()
        for parameter, place in self._places:
            if parameter.grad is None:  # on a rank without micro-batches, which has not begun any reduction
                parameter.grad = place.zero_()
        self._launch(len(self._early))
        all_reduce(self._last)
        try:
            for work in self._launched:
                work.wait()
        except RuntimeError as error:
            raise CollectiveFailed(str(error)) from error
        norm = _clip(self._gradients, clip)
        loss, command, save, norm, own = torch.cat((self._tail, norm.view(1), own)).tolist()
        return Reduced(loss, norm, Signals(command > 0, save > 0), own)

    def _arrived(self, bucket: int, place: Tensor, parameter: Tensor) -> None:
        """Place a parameter's gradient, complete for this micro-batch; reduce the buckets that are complete."""
        gradient = cast(Tensor, parameter.grad)
        if gradient is not place:
            parameter.grad = place.copy_(gradient)
        if not self._in_last_backward:
            return
        self._missing[bucket] -= 1
        complete = next((number for number, missing in enumerate(self._missing) if missing), len(self._missing))
        self._launch(complete)

    def _launch(self, until: int) -> None:
        """Start the reductions of the buckets before `until` that are not under way."""
        for bucket in self._early[len(self._launched) : until]:
            work = dist.all_reduce(bucket, async_op=True)
            assert work is not None  # this process is in the group
            self._launched.append(work)


class ShardedGradients:
    """Gradients of FSDP2, reduced in backward to each rank's shard; loss and signals have a small reduction."""

    padded = True

    def __init__(self, model: nn.Module) -> None:
        self._root = cast(FSDPModule, model)
        self._parameters = list(model.parameters())
        self._tail = torch.zeros(3, device=self._parameters[0].device)

    def begin(self) -> None:
        """Drop the last step's gradients; `model.zero_grad` would miss those of the root."""
        for parameter in self._parameters:
            parameter.grad = None
        self._tail.zero_()

    def add(self, loss: Tensor, last: bool) -> None:
        """Accumulate unreduced, and reduce with the last micro-batch."""
        self._root.set_requires_gradient_sync(last)
        loss.backward()
        self._tail[0] += loss.detach()

    def reduce(self, signals: Signals, clip: float | None) -> Reduced:
        """Reduce the loss and the signals, and clip."""
        set_signals(self._tail[1:], signals)
        own = self._tail[:1].clone()
        all_reduce(self._tail)
        limit = math.inf if clip is None else clip
        norm = cast(DTensor, nn.utils.clip_grad_norm_(self._parameters, limit)).full_tensor()
        loss, command, save, own = torch.cat((self._tail, own)).tolist()
        return Reduced(loss, float(norm), Signals(command > 0, save > 0), own)


def _buckets(sizes: Iterable[int], limit: int) -> list[list[int]]:
    """Divide sizes, in order, into groups that reach the limit, except the last."""
    buckets: list[list[int]] = [[]]
    for size in sizes:
        if sum(buckets[-1]) >= limit:
            buckets.append([])
        buckets[-1].append(size)
    return buckets


def flat_buffer(parameters: list[nn.Parameter], tail: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a buffer, its gradients, and its last `tail` elements; `.grad` of each parameter views the buffer."""
    size = sum(parameter.numel() for parameter in parameters)
    flat = torch.zeros(size + tail, device=parameters[0].device)
    begin = 0
    for parameter in parameters:
        parameter.grad = flat[begin : begin + parameter.numel()].view_as(parameter)
        begin += parameter.numel()
    return flat, flat[:size], flat[size:]


def set_signals(tail: Tensor, signals: Signals) -> None:
    """Set the first two elements, which are zero, to the signals."""
    if signals.command:
        tail[0] = 1
    if signals.save:
        tail[1] = 1


def clip_factor(norm: Tensor, clip: float) -> Tensor:
    """Return the factor that scales gradients of this norm to a norm of at most `clip`."""
    return torch.clamp(clip / (norm + 1e-6), max=1.0)


def all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """Reduce in place over all ranks. Raises CollectiveFailed."""
    try:
        dist.all_reduce(tensor, op)
    except RuntimeError as error:
        raise CollectiveFailed(str(error)) from error


def _clip(gradients: Tensor, clip: float | None) -> Tensor:
    """Return the norm and scale the gradients to at most `clip`, without waiting for the device."""
    norm = torch.linalg.vector_norm(gradients)
    if clip is not None:
        gradients.mul_(clip_factor(norm, clip))
    return norm
