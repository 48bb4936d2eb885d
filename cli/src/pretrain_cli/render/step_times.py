"""Time of steps by part, in numbers and as a figure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.figure import Figure

from pretrain_api.status.records import STEP_PARTS, StepRecord, parts_of

COLOURS: Mapping[str, str] = {
    "data": "#06b6d4", "compute": "#16a34a", "reduce": "#f59e0b", "optimizer": "#2563eb", "stall": "#9333ea",
    "other": "#9ca3af",
}  # fmt: skip
NAMES: Mapping[str, str] = {
    "data": "data wait",
    "compute": "forward and backward",
    "reduce": "all-reduce wait",
    "optimizer": "optimizer",
    "stall": "checkpoint stall",
    "other": "other",
}
BINS = 150
"""Maximum points of a curve; in longer runs each is the mean of several steps."""
MUTED = "#6b7280"


def mean_parts(records: Sequence[StepRecord]) -> dict[str, float]:
    """Compute the mean seconds of a step by part; empty if no record has times."""
    timed = [parts_of(record) for record in records if record.seconds > 0]
    return {part: fmean(parts[part] for parts in timed) for part in STEP_PARTS} if timed else {}


def step_parts_text(record: StepRecord) -> str:
    """Format a step's time and its larger parts: `0.104 s: compute 83 %, reduce 10 %`."""
    shares = {part: seconds / record.seconds for part, seconds in parts_of(record).items()} if record.seconds else {}
    large = [f"{part} {share:.0%}" for part, share in shares.items() if share >= 0.005]
    return f"{record.seconds:.3g} s: {', '.join(large)}" if large else "–"


def draw_step_parts(records: Sequence[StepRecord]) -> str:
    """Draw the parts of steps as a stacked plot in one `<svg>`, with the MFU as a line; empty if no record has times.

    `records`: one for each step.
    """
    timed = [record for record in records if record.seconds > 0]
    if not timed:
        return ""
    width = -(-len(timed) // BINS)
    bins = [timed[start : start + width] for start in range(0, len(timed), width)]
    steps = [fmean(record.step for record in part) for part in bins]
    means = [mean_parts(part) for part in bins]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(
        steps, [[mean[part] for mean in means] for part in STEP_PARTS],
        labels=[NAMES[part] for part in STEP_PARTS], colors=[COLOURS[part] for part in STEP_PARTS], alpha=0.85,
        linewidth=0,
    )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("seconds per step")
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.spines[["top", "right"]].set_visible(False)
    known = [(step, fmean(found)) for step, part in zip(steps, bins, strict=True) if (found := _mfus(part))]
    if known:
        beside = axes.twinx()
        beside.plot(*zip(*known, strict=True), color="#111827", linewidth=1.2, label="MFU (right)")
        beside.set_ylim(0, 1.15 * max(mfu for _, mfu in known))
        beside.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
        beside.set_ylabel("MFU")
        beside.spines[["top"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside lower center", ncols=3, fontsize=8, frameon=False, labelcolor=MUTED
    )
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _mfus(records: Sequence[StepRecord]) -> list[float]:
    return [record.mfu for record in records if record.mfu is not None]
