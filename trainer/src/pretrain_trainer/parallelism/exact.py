"""Exact mode: sums of integers, which are the same in any order and grouping, and so at any world size.

Each micro-batch's loss and gradient are rounded to multiples of 2**-36 and added as int64, on the rank and between the
ranks. Backward runs on the loss times 2**36, which is exact, so that gradients arrive in these units. Where a gradient
could have made the sum of all wrap, the norm is infinite on all ranks: the update is not made, as with any step that is
not finite. What follows from the sum (norm, clipping, update) is computed alike wherever its parts lie: the norm is a
sum of integers too.
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
"""Gradients are in multiples of 2**-36 (measured to train like fp32)."""
UNITS = 2.0**FRACTION_BITS
_SQUARE_BITS = 23
"""Of the numbers that are squared for the norm; the sum of the squares is kept in two parts of as many bits."""
_IN_CACHE = 1 << 15
_ON_DEVICE = 1 << 24


class FixedPoint:
    """Rounds to integers of which `addends` may be added without wrapping, and remembers the largest for that."""

    def __init__(self, addends: int, device: torch.device) -> None:
        self.limit = 2.0 ** (62 - FRACTION_BITS) / addends
        self._largest = torch.zeros((), device=device)

    def begin(self) -> None:
        """Forget the last step."""
        self._largest.zero_()

    def integers(self, units: Tensor) -> Tensor:
        """int64 of fp32 `units`, which is rounded in place."""
        low, high = torch.aminmax(units)  # NaN passes through these
        torch.maximum(self._largest, torch.maximum(-low, high), out=self._largest)
        return units.round_().to(torch.int64)

    def findings(self) -> Tensor:
        """(2,) of fp32, 1 where something was no number, and where something could have made a sum wrap."""
        return torch.stack((~self._largest.isfinite(), self._largest >= self.limit * UNITS)).float()

    def reduced(
        self, units: float, norm: float, signals: Signals, own: int, not_finite: float, too_large: float
    ) -> Reduced:
        """The outcome: the loss is NaN when there were no numbers, the norm infinite when a sum may have wrapped."""
        if not_finite:
            return Reduced(math.nan, norm, signals, own / UNITS)
        if too_large:
            note = f"a gradient of {self.limit:g} or more does not fit the fixed point of training.exact"
            return Reduced(units / UNITS, math.inf, signals, own / UNITS, note)
        return Reduced(units / UNITS, norm, signals, own / UNITS)


class ExactGradients:
    """Plain data parallel: one all-reduce of integers for everything."""

    padded = False

    def __init__(self, parameters: Iterable[nn.Parameter], micro_batches: int) -> None:
        self._flat, self._gradients, self._loss = flat_buffer(list(parameters), tail=1)
        self._fixed = FixedPoint(micro_batches, self._flat.device)
        self._sum = torch.zeros(self._flat.numel() + 4, dtype=torch.int64, device=self._flat.device)

    def begin(self) -> None:
        """Set all to zero."""
        self._flat.zero_()
        self._sum.zero_()
        self._fixed.begin()

    def add(self, loss: Tensor, last: bool) -> None:
        """Round this micro-batch's loss and gradient to integers and add those."""
        units = loss * UNITS
        units.backward()
        self._loss[0] = units.detach()
        self._sum[:-4] += self._fixed.integers(self._flat)
        self._flat.zero_()

    def reduce(self, signals: Signals, clip: float | None) -> Reduced:
        """One all-reduce of integers, then back to fp32."""
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
    """FSDP2: integers are added up on the rank until the step's last micro-batch, then scattered by FSDP's own hooks.

    Each rank holds 8 bytes for each parameter of the whole model, where plain sums hold 4. With hybrid shards FSDP2 is
    over one set of `shards` ranks only: the hooks sum over the sets, whose ranks with the same shard are `copies`.
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
        """Whether this rank's shard is counted in the norm: of copies one is."""
        self._scatters = [
            _attach(module, self._fixed, shards, copies) for module in model.modules() if isinstance(module, FSDPModule)
        ]

    def begin(self) -> None:
        """Drop the last step's gradients; `model.zero_grad` would miss the root's."""
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
        """Sum the loss and the norm, and clip."""
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
    """Of one FSDP module. FSDP adds up what each backward of a step scatters: zeros, until the last one."""

    def __init__(self, fixed: FixedPoint, copies: dist.ProcessGroup | None) -> None:
        self._fixed = fixed
        self._copies = copies
        self._sum: Tensor | None = None
        self._filled = False
        self.last = True

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for FSDP's buffers."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Sum over the ranks of `group`, of which each gets its part."""
        total = self._added(input_tensor)
        if total is None:
            output_tensor.zero_()
            return
        part = torch.empty(output_tensor.shape, dtype=torch.int64, device=output_tensor.device)
        dist.reduce_scatter_single(part, total, group=group)
        self._finish(part, output_tensor)

    def alone(self, gradient: Tensor) -> None:
        """The same in place, where there is one rank: FSDP calls no reduce-scatter then."""
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
        """The step's sum, with its last micro-batch."""
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
    """A power of two (fp64, without dimension) that takes all up to `largest` below 2**23."""
    _, exponent = torch.frexp(largest)
    return torch.ldexp(torch.ones((), dtype=torch.float64, device=largest.device), _SQUARE_BITS - exponent)


def squares(gradients: Iterable[Tensor], scale: Tensor) -> Tensor:
    """(2,) of int64: the sum of the squares of all elements times `scale`, as upper and lower 23 bits.

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
    """The norm (fp32) of which `squares` is the sum."""
    return (total[0].double().mul(1 << _SQUARE_BITS).add(total[1]).sqrt() / scale).float()
