"""The divergence detector: from the losses and gradient norms so far, whether a step's are what can be expected.

Pure, and its whole memory is part of the state that checkpoints hold: every rank sees the same reduced numbers and
comes to the same verdict, and so does whoever goes on from a checkpoint. It looks before the update is made.

A loss is an outlier when it lies above the median of the last CENTRE_STEPS by more than `threshold` times the noise
*and* by more than LEAST_RISE of it. The noise is the scaled median of the differences from step to step, so that a
curve that falls steeply, as in a warm-up, does not look noisy. A gradient norm is judged likewise by its logarithm.
Outliers do not enter the memory. One alone is no divergence: batches differ, and clipping and Adam bear it. Several
within a few steps are: then it began with the first of them. OLMo skips a step beyond 6 standard deviations of the last
128 losses or norms; PaLM went back 100 steps and passed over 200 to 500 batches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from pretrain_api.checkpoint.lineage import DivergenceCause, LossMemory

MEMORY_STEPS = 64
"""Noise is taken over so many steps …"""
CENTRE_STEPS = 32
"""… and the level over so many: long enough for five outliers not to move it."""
LEAST_STEPS = 20
"""Before that nothing is known of what is normal, and only what is not finite is a divergence."""
LEAST_RISE = 0.05
"""A loss that is higher by less than this part of it is no spike, however smooth the curve was."""
LEAST_FACTOR = 5.0
"""Nor is a gradient norm below so many times the median one."""
SPIKE_STEPS = 5
"""So many outliers …"""
WITHIN_STEPS = 10
"""… among so many steps are a spike."""
UNEASY_OUTLIERS = 2
"""From so many on a checkpoint is put off: it may already be spoiled, and would displace a sound one."""
DEVIATION = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""
FLAT_SPANS = 10
"""A loss whose mean over a span has not been the lowest so far for so many spans has come to a plateau."""
SPANS = 50
"""A run has so many spans, none shorter than LEAST_SPAN steps."""
LEAST_SPAN = 50

Look = Literal["normal", "outlier", "spike", "not finite"]


@dataclass(frozen=True)
class StepVerdict:
    """What a step's loss and gradient norm mean. `since` is the step at which a spike began, else the step itself."""

    look: Look
    step: int
    since: int
    watch: LossMemory
    """The memory with this step in it."""
    said: str = ""
    """What was seen, for people; empty when all is normal."""
    plateau: bool = False
    """The loss has just come to a plateau."""

    @property
    def cause(self) -> DivergenceCause | None:
        """Why the loss counts as diverged, if it does."""
        if self.look == "spike":
            return "LossSpike"
        return "LossNotFinite" if self.look == "not finite" else None

    @property
    def uneasy(self) -> bool:
        """A spike may have begun."""
        return len(self.watch.outliers) >= UNEASY_OUTLIERS


def look(watch: LossMemory, step: int, loss: float, norm: float, *, threshold: float, total_steps: int) -> StepVerdict:
    """Judge step `step`, whose loss is in nats per token and whose gradient norm is that before clipping."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return StepVerdict("not finite", step, step, watch, f"loss {loss:.6g}, gradient norm {norm:.6g}")
    loss, norm = _kept(loss), _kept(norm)
    said = _outlying(watch, loss, norm, threshold)
    outliers = tuple(earlier for earlier in watch.outliers if earlier > step - WITHIN_STEPS)
    if said:
        outliers = (*outliers, step)
        kept = watch.model_copy(update={"outliers": outliers})
        if len(outliers) < SPIKE_STEPS:
            return StepVerdict("outlier", step, step, kept, said)
        said += f"; {len(outliers)} of the last {step - outliers[0] + 1} steps were like that"
        return StepVerdict("spike", step, outliers[0], kept, said)
    after, plateau = _span(watch, loss, max(LEAST_SPAN, total_steps // SPANS))
    after = after.model_copy(
        update={
            "losses": (*watch.losses, loss)[-MEMORY_STEPS:],
            "norms": (*watch.norms, norm)[-MEMORY_STEPS:],
            "outliers": outliers,
        }
    )
    return StepVerdict("normal", step, step, after, plateau=plateau)


def anew(watch: LossMemory) -> LossMemory:
    """The memory without what was normal up to now: what comes next is."""
    return watch.model_copy(update={"losses": (), "norms": (), "outliers": ()})


def _outlying(watch: LossMemory, loss: float, norm: float, threshold: float) -> str:
    """What is out of the ordinary, or an empty text."""
    if len(watch.losses) < LEAST_STEPS:
        return ""
    level, noise = _level(watch.losses), _noise(watch.losses)
    if loss - level > max(threshold * noise, LEAST_RISE * abs(level)):
        return f"loss {loss:.4g} where {level:.4g} is normal (noise {noise:.2g})"
    logs = [math.log(max(value, 1e-30)) for value in watch.norms]
    height = math.log(max(norm, 1e-30)) - _level(logs)
    if height > max(threshold * _noise(logs), math.log(LEAST_FACTOR)):
        return f"gradient norm {norm:.4g} where {math.exp(_level(logs)):.4g} is normal"
    return ""


def _level(values: Sequence[float]) -> float:
    return median(values[-CENTRE_STEPS:])


def _noise(values: Sequence[float]) -> float:
    """The standard deviation of one value around a curve that changes slowly."""
    steps = [abs(after - before) for before, after in itertools.pairwise(values)]
    return DEVIATION * median(steps) / math.sqrt(2)


def _span(watch: LossMemory, loss: float, length: int) -> tuple[LossMemory, bool]:
    """The memory with this loss in the span under way; whether a plateau was reached with it."""
    count, total = watch.span[0] + 1, watch.span[1] + loss
    if count < length:
        return watch.model_copy(update={"span": (count, total)}), False
    mean = _kept(total / count)
    if watch.lowest is None or mean < watch.lowest:
        return watch.model_copy(update={"span": (0, 0.0), "lowest": mean, "flat_spans": 0}), False
    flat = watch.flat_spans + 1
    return watch.model_copy(update={"span": (0, 0.0), "flat_spans": flat}), flat == FLAT_SPANS


def _kept(value: float) -> float:
    """As it is remembered: in six digits, before a restart as after it."""
    return float(f"{value:.6g}")
