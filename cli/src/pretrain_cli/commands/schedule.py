"""`pretrain schedule`: show a job's learning rate as a table, a curve and a plot."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter
from rich.console import Console
from rich.table import Table

from pretrain_api.problems import InvalidJob
from pretrain_api.spec.job import PretrainJob
from pretrain_api.spec.schedule import LearningRates, SchedulePhase
from pretrain_cli.errors import CliExit
from pretrain_cli.inputs.job_file import load_job
from pretrain_cli.render.figure import CURVE, MUTED
from pretrain_cli.render.sparkline import sparkline

POINTS = 2000
"""Maximum number of steps to draw, in addition to those of the table."""
_SHADES: dict[SchedulePhase, str] = {"warm-up": "#fef3c7", "stable": "#dcfce7", "decay": "#dbeafe"}


def schedule(path: Path, sets: tuple[str, ...], out: Path) -> int:
    """Draw a job's schedule, or print the mistakes of the input; return the exit code."""
    try:
        job = load_job(path, sets)
    except InvalidJob as invalid:
        print(invalid, file=sys.stderr)
        return CliExit.BAD_INPUT
    try:
        draw(job).savefig(out, dpi=150, format="png")
    except OSError as error:
        print(f"--out {out} cannot be written ({error.strerror}): give another file", file=sys.stderr)
        return CliExit.BAD_INPUT
    console = Console()
    console.print(table(job))
    rates = LearningRates.of(job.spec.training)
    width = max(10, min(console.width - 2, 80))
    curve = sparkline([rates.at(step) for step in _spread(rates.total, POINTS)], width)
    console.print(curve, highlight=False)
    console.print(f"plot: {out}", highlight=False, soft_wrap=True)
    return CliExit.DONE


def table(job: PretrainJob) -> Table:
    """Build a table of the rate at its turning points, at each tenth of the run, and at both ends."""
    training = job.spec.training
    rates = LearningRates.of(training)
    title = f"{job.metadata.name}: {rates.kind}, {rates.total:,} steps of {training.tokens_per_step:,} tokens"
    result = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bright_black")
    for name in ("step", "tokens", "done", "learning rate", "of the peak"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("phase", no_wrap=True)
    for step in table_steps(rates):
        rate = rates.at(step)
        tokens = step * training.tokens_per_step
        result.add_row(
            f"{step:,}", f"{tokens:,}", f"{step / rates.total:.0%}", f"{rate:.3e}", f"{rate / rates.peak:.1%}",
            rates.phase(step),
        )  # fmt: skip
    return result


def table_steps(rates: LearningRates) -> tuple[int, ...]:
    """Select the steps that describe the whole schedule."""
    wanted = {1, rates.total, math.ceil(rates.warmup), *(round(rates.total * tenth / 10) for tenth in range(1, 10))}
    if rates.kind == "wsd":
        wanted.add(math.floor(rates.total - rates.decay))
    return tuple(sorted(step for step in wanted if 1 <= step <= rates.total))


def draw(job: PretrainJob) -> Figure:
    """Plot the rate over steps, with a token axis and shaded phases."""
    training = job.spec.training
    rates, per_step = LearningRates.of(training), training.tokens_per_step
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes: Axes = figure.subplots()
    steps = sorted({*_spread(rates.total, POINTS), *table_steps(rates)})
    axes.plot(steps, [rates.at(step) for step in steps], color=CURVE, linewidth=1.8)
    for phase, color in _SHADES.items():
        there = [step for step in steps if rates.phase(step) == phase]
        if there:
            begin = max(there[0] - 1, 0)
            axes.axvspan(begin, there[-1], color=color, zorder=0)
            axes.annotate(
                phase, ((begin + there[-1]) / 2, 0.03), xycoords=("data", "axes fraction"), ha="center", fontsize=9,
                color=MUTED,
            )  # fmt: skip
    axes.set_xlim(0, rates.total)
    axes.set_ylim(0, 1.08 * rates.peak)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axes.spines["right"].set_visible(False)
    axes.grid(alpha=0.2)
    tokens = axes.secondary_xaxis("top", functions=(partial(np.multiply, per_step), partial(np.multiply, 1 / per_step)))
    tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
    tokens.set_xlabel("tokens")
    figure.suptitle(f"{job.metadata.name}: {rates.kind}, peak {rates.peak:g}", fontweight="bold")
    return figure


def _spread(total: int, count: int) -> list[int]:
    """Spread at most `count` steps evenly from the first to the last."""
    if total <= count:
        return list(range(1, total + 1))
    return sorted({1 + round(index * (total - 1) / (count - 1)) for index in range(count)})
