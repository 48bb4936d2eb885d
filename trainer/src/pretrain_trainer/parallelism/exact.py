"""Exact mode: gradients are summed as integers, with the same result in any order and grouping, at any world size.

Each micro-batch's loss and gradient are rounded to multiples of 2**-36 and added as int64, on the rank and between the
ranks. Backward runs on the loss times 2**36, which is exact, so that gradients arrive in these units. If a gradient
could have made the sum wrap, the norm is infinite on all ranks, and the update is dropped as in any step that is not
finite. Norm, clipping and update are computed alike wherever the parts lie: the norm is a sum of integers too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor

from pretrain_trainer.parallelism.gradients import Reduced, Signals, all_reduce, clip_factor, flat_buffer, set_signals

FRACTION_BITS = 36
"""Gradients are multiples of 2**-36 (measured to train like fp32)."""
UNITS = 2.0**FRACTION_BITS
_SQUARE_BITS = 23
"""Bits of the numbers that are squared for the norm; the sum of squares is kept in two parts of as many bits."""
_IN_CACHE = 1 << 15
_ON_DEVICE = 1 << 24


class FixedPoint:
    """Rounding to integers of which `addends` can be summed without wrapping; tracks the largest to detect a wrap."""

    def __init__(self, addends: int, device: torch.device) -> None:
        self.limit = 2.0 ** (62 - FRACTION_BITS) / addends
        self._largest = torch.zeros((), device=device)

    def begin(self) -> None:
        """Reset for the next step."""
        self._largest.zero_()

    def integers(self, units: Tensor) -> Tensor:
        """Return fp32 `units` as int64, rounding them in place."""
        low, high = torch.aminmax(units)  # NaN passes through these
        torch.maximum(self._largest, torch.maximum(-low, high), out=self._largest)
        return units.round_().to(torch.int64)

    def findings(self) -> Tensor:
        """Return two fp32 flags: a value was not finite; a value could have made a sum wrap."""
        return torch.stack((~self._largest.isfinite(), self._largest >= self.limit * UNITS)).float()

    def reduced(
        self, units: float, norm: float, signals: Signals, own: int, not_finite: float, too_large: float
    ) -> Reduced:
        """Return the result: the loss is NaN if a value was not finite, the norm infinite if a sum may have wrapped."""
        if not_finite:
            return Reduced(math.nan, norm, signals, own / UNITS)
        if too_large:
            note = f"a gradient of {self.limit:g} or more does not fit the fixed point of training.exact"
            return Reduced(units / UNITS, math.inf, signals, own / UNITS, note)
        return Reduced(units / UNITS, norm, signals, own / UNITS)


class ExactGradients:
    """Gradients of plain data parallel: one all-reduce of integers."""

    padded = False

    def __init__(self, parameters: Iterable[nn.Parameter], micro_batches: int) -> None:
        self._flat, self._gradients, self._loss = flat_buffer(list(parameters), tail=1)
        self._fixed = FixedPoint(micro_batches, self._flat.device)
        self._sum = torch.zeros(self._flat.numel() + 4, dtype=torch.int64, device=self._flat.device)

    def begin(self) -> None:
        """Set all sums to zero."""
        self._flat.zero_()
        self._sum.zero_()
        self._fixed.begin()

    def add(self, loss: Tensor, last: bool) -> None:
        """Round this micro-batch's loss and gradient to integers and add them."""
        units = loss * UNITS
        units.backward()
        self._loss[0] = units.detach()
        self._sum[:-4] += self._fixed.integers(self._flat)
        self._flat.zero_()

    def reduce(self, signals: Signals, clip: float | None) -> Reduced:
        """All-reduce the integers and convert them to fp32."""
        set_signals(self._sum[-4:-2], signals)
        self._sum[-2:] = self._fixed.findings()
        own = int(self._sum[-5])  # The flat buffer's last element is the loss.
        all_reduce(self._sum)
        self._flat.copy_(self._sum[:-4]).mul_(1 / UNITS)
        norm = norm_of(squares([self._gradients], scale := square_scale(self._gradients.abs().max())), scale)
        if clip is not None:
            self._gradients.mul_(clip_factor(norm, clip))
        loss, command, save, *findings = self._sum[-5:].tolist()
        return self._fixed.reduced(loss, float(norm), Signals(command > 0, save > 0), own, *findings)


class ExactShardedGradients:
    """Gradients of FSDP2: integers add up on the rank until the step's last micro-batch; FSDP's hooks scatter them.

    Each rank holds 8 bytes for each parameter of the whole model, against 4 of plain sums. With hybrid shards FSDP2
    spans one set of `shards` ranks only: the hooks sum over the sets, whose ranks with the same shard are `copies`.
    """

    padded = True

    def __init__(
        self, model: nn.Module, micro_batches: int, shards: int, copies: dist.ProcessGroup | None = None
    ) -> None:
        self._parameters = list(model.parameters())
        device = self._parameters[0].device
        self._fixed = FixedPoint(micro_batches, device)
        self._loss = torch.zeros(1, dtype=torch.int64, device=device)
        self._counts = copies is None or dist.get_rank(copies) == 0
        """True if this rank's shard counts in the norm: that of one of the copies does."""
        self._scatters = [
            _attach(module, self._fixed, shards, copies) for module in model.modules() if isinstance(module, FSDPModule)
        ]

    def begin(self) -> None:
        """Drop the last step's gradients; `model.zero_grad` would miss those of the root."""
        for parameter in self._parameters:
            parameter.grad = None
        self._loss.zero_()
        self._fixed.begin()

    def add(self, loss: Tensor, last: bool) -> None:
        """Accumulate as integers, and reduce with the last micro-batch."""
        for scatter in self._scatters:
            scatter.last = last
        units = loss * UNITS
        units.backward()
        self._loss += self._fixed.integers(units.detach())

    def reduce(self, signals: Signals, clip: float | None) -> Reduced:
        """Reduce the loss and the norm, and clip."""
        gradients = [cast(DTensor, parameter.grad).to_local() for parameter in self._parameters]
        gradients = [gradient for gradient in gradients if gradient.numel()]
        most = torch.zeros(5, device=self._loss.device)
        set_signals(most, signals)
        most[2:4] = self._fixed.findings()
        if gradients:
            most[4] = torch.stack([gradient.abs().max() for gradient in gradients]).max()
        all_reduce(most, dist.ReduceOp.MAX)
        sums = torch.cat((self._loss, squares(gradients if self._counts else (), scale := square_scale(most[4]))))
        own = int(self._loss)
        all_reduce(sums)
        norm = norm_of(sums[1:], scale)
        if clip is not None:
            factor = clip_factor(norm, clip)
            for gradient in gradients:
                gradient.mul_(factor)
        command, save, *findings = most[:4].tolist()
        return self._fixed.reduced(int(sums[0]), float(norm), Signals(command > 0, save > 0), own, *findings)


class _ExactReduceScatter(ReduceScatter):
    """Reduce-scatter of one FSDP module. FSDP adds up the results of a step's backwards: zeros, until the last one."""

    def __init__(self, fixed: FixedPoint, copies: dist.ProcessGroup | None) -> None:
        self._fixed = fixed
        self._copies = copies
        self._sum: Tensor | None = None
        self._filled = False
        self.last = True

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate FSDP's buffers."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Sum over the ranks of `group` and give each its part."""
        total = self._added(input_tensor)
        if total is None:
            output_tensor.zero_()
            return
        part = torch.empty(output_tensor.shape, dtype=torch.int64, device=output_tensor.device)
        dist.reduce_scatter_single(part, total, group=group)
        self._finish(part, output_tensor)

    def alone(self, gradient: Tensor) -> None:
        """Convert in place in a world of one rank, where FSDP calls no reduce-scatter."""
        total = self._added(gradient)
        if total is None:
            gradient.zero_()
        else:
            self._finish(total, gradient)

    def _finish(self, part: Tensor, output: Tensor) -> None:
        if self._copies is not None:
            dist.all_reduce(part, group=self._copies)
        output.copy_(part).mul_(1 / UNITS)

    def _added(self, gradient: Tensor) -> Tensor | None:
        """Add a micro-batch; return the step's sum with its last one, None before."""
        integers = self._fixed.integers(gradient)
        if self.last and not self._filled:
            return integers
        if self._sum is None:
            self._sum = torch.empty_like(integers)
        if self._filled:
            self._sum += integers
        else:
            self._sum.copy_(integers)
        self._filled = not self.last
        return self._sum if self.last else None


def _attach(
    module: FSDPModule, fixed: FixedPoint, shards: int, copies: dist.ProcessGroup | None
) -> _ExactReduceScatter:
    scatter = _ExactReduceScatter(fixed, copies)
    if shards > 1:
        module.set_custom_reduce_scatter(scatter)
    else:
        module.set_all_reduce_hook(scatter.alone)
    return scatter


def square_scale(largest: Tensor) -> Tensor:
    """Return a power of two (fp64, without dimension) that scales all values up to `largest` below 2**23."""
    _, exponent = torch.frexp(largest)
    return torch.ldexp(torch.ones((), dtype=torch.float64, device=largest.device), _SQUARE_BITS - exponent)


def squares(gradients: Iterable[Tensor], scale: Tensor) -> Tensor:
    """Return the sum of the squares of all elements times `scale`: int64 (2,), the upper and lower 23 bits.

    Every square is rounded to an integer before it is added, so that the sum is the same in any order; it does not
    wrap below 2**39 elements.
    """
    total = torch.zeros(2, dtype=torch.int64, device=scale.device)
    size = _IN_CACHE if scale.device.type == "cpu" else _ON_DEVICE
    for gradient in gradients:
        for part in gradient.reshape(-1).split(size):
            square = part.double().mul_(scale).square_().round_().to(torch.int64)
            total[0] += (square >> _SQUARE_BITS).sum()
            total[1] += (square & (1 << _SQUARE_BITS) - 1).sum()
    return total


def norm_of(total: Tensor, scale: Tensor) -> Tensor:
    """Return the norm (fp32) for the sum of `squares`."""
    return (total[0].double().mul(1 << _SQUARE_BITS).add(total[1]).sqrt() / scale).float()
