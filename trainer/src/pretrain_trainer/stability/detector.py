"""Divergence detector: judges a step's loss and gradient norm by those of the steps before, ahead of the update.

Pure. Its memory is part of the state in checkpoints: every rank sees the same reduced numbers and reaches the same
verdict, and so does a run that resumes from a checkpoint.

A loss is an outlier when it exceeds the median of the last CENTRE_STEPS by more than `threshold` times the noise *and*
by more than LEAST_RISE of that median. The noise is the scaled median of the differences between consecutive steps, so
that a steeply falling curve, as in a warm-up, does not look noisy. The logarithm of a gradient norm is judged likewise.
Outliers do not enter the memory. A single outlier is no divergence: batches differ, and clipping and Adam absorb it.
Several within a few steps are a spike that began with the first of them. OLMo skips a step beyond 6 standard deviations
of the last 128 losses or norms; PaLM went back 100 steps and skipped 200 to 500 batches.
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
"""Steps over which the noise is estimated."""
CENTRE_STEPS = 32
"""Steps over which the level is estimated: long enough for five outliers not to shift it."""
LEAST_STEPS = 20
"""Steps before the first judgement: until then only a value that is not finite is a divergence."""
LEAST_RISE = 0.05
"""Least relative rise of a loss that counts as an outlier, however smooth the curve was."""
LEAST_FACTOR = 5.0
"""Least ratio of a gradient norm to the median that counts as an outlier."""
SPIKE_STEPS = 5
"""Outliers that make a spike …"""
WITHIN_STEPS = 10
"""… within this number of steps."""
UNEASY_OUTLIERS = 2
"""Outliers from which on saves are deferred: the state may be spoiled, and its checkpoint would displace a good one."""
DEVIATION = 1.4826
"""Ratio of the standard deviation of a normal distribution to its median absolute deviation."""
FLAT_SPANS = 10
"""Consecutive spans without a new lowest mean loss that make a plateau."""
SPANS = 50
"""Spans of a run, unless they would be shorter than LEAST_SPAN steps."""
LEAST_SPAN = 50

Finding = Literal["normal", "outlier", "spike", "not finite"]


@dataclass(frozen=True)
class StepVerdict:
    """The judgement of one step."""

    finding: Finding
    step: int
    since: int
    """The step at which a spike began, else the step itself."""
    watch: LossMemory
    """The memory including this step."""
    description: str = ""
    """Description of an abnormal step; empty for a normal one."""
    plateau: bool = False
    """True if the loss reached a plateau with this step."""

    @property
    def cause(self) -> DivergenceCause | None:
        """The cause of a divergence; None if there is none."""
        if self.finding == "spike":
            return "LossSpike"
        return "LossNotFinite" if self.finding == "not finite" else None

    @property
    def uneasy(self) -> bool:
        """True while a spike may have begun."""
        return len(self.watch.outliers) >= UNEASY_OUTLIERS


def judge(watch: LossMemory, step: int, loss: float, norm: float, *, threshold: float, total_steps: int) -> StepVerdict:
    """Judge a step by its loss in nats per token and its gradient norm before clipping."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return StepVerdict("not finite", step, step, watch, f"loss {loss:.6g}, gradient norm {norm:.6g}")
    loss, norm = _kept(loss), _kept(norm)
    description = _outlying(watch, loss, norm, threshold)
    outliers = tuple(earlier for earlier in watch.outliers if earlier > step - WITHIN_STEPS)
    if description:
        outliers = (*outliers, step)
        kept = watch.model_copy(update={"outliers": outliers})
        if len(outliers) < SPIKE_STEPS:
            return StepVerdict("outlier", step, step, kept, description)
        description += f"; {len(outliers)} of the last {step - outliers[0] + 1} steps were outliers"
        return StepVerdict("spike", step, outliers[0], kept, description)
    after, plateau = _span(watch, loss, max(LEAST_SPAN, total_steps // SPANS))
    after = after.model_copy(
        update={
            "losses": (*watch.losses, loss)[-MEMORY_STEPS:],
            "norms": (*watch.norms, norm)[-MEMORY_STEPS:],
            "outliers": outliers,
        }
    )
    return StepVerdict("normal", step, step, after, plateau=plateau)


def forget_normal(watch: LossMemory) -> LossMemory:
    """Return the memory without its baseline: the next steps define what is normal."""
    return watch.model_copy(update={"losses": (), "norms": (), "outliers": ()})


def _outlying(watch: LossMemory, loss: float, norm: float, threshold: float) -> str:
    """Describe an outlier; empty for a normal step."""
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
    """Estimate the standard deviation of a value around a slowly changing curve."""
    steps = [abs(after - before) for before, after in itertools.pairwise(values)]
    return DEVIATION * median(steps) / math.sqrt(2)


def _span(watch: LossMemory, loss: float, length: int) -> tuple[LossMemory, bool]:
    """Return the memory with this loss in the current span, and True if a plateau was reached."""
    count, total = watch.span[0] + 1, watch.span[1] + loss
    if count < length:
        return watch.model_copy(update={"span": (count, total)}), False
    mean = _kept(total / count)
    if watch.lowest is None or mean < watch.lowest:
        return watch.model_copy(update={"span": (0, 0.0), "lowest": mean, "flat_spans": 0}), False
    flat = watch.flat_spans + 1
    return watch.model_copy(update={"span": (0, 0.0), "flat_spans": flat}), flat == FLAT_SPANS


def _kept(value: float) -> float:
    """Round to the six digits that a checkpoint keeps, so that a restart changes no verdict."""
    return float(f"{value:.6g}")
