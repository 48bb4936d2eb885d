"""Live view of a run in a terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pretrain_api.checkpoint.lineage import parse_manifest_key
from pretrain_api.estimate.throughput import StepRate
from pretrain_api.status.job import Incident, JobStatus
from pretrain_api.status.records import EvaluationResult, StepRecord
from pretrain_cli.render.evaluation_text import evaluation_text, evaluation_title
from pretrain_cli.render.sparkline import sparkline
from pretrain_cli.render.step_times import step_parts_text
from pretrain_operator.cluster import Event

EVENTS = 6
INCIDENTS = 4
WIDE = 110
"""Minimum columns to show workers and incidents side by side."""

PHASE_STYLES = {"Training": "green", "Succeeded": "green", "Recovering": "yellow", "Failed": "bold red"}
STATE_STYLES = {"Training": "green", "Joined": "cyan", "Starting": "yellow", "Leaving": "yellow", "Lost": "red"}


class TerminalView:
    """Context manager of a view that `refresh` redraws in place; it disappears at the end, before the summary."""

    def __init__(self, console: Console, clock: Callable[[], float], name: str, total_steps: int) -> None:
        self._console = console
        self._clock = clock
        self._name = name
        self._total = total_steps
        self._rate = StepRate()
        self._losses: dict[int, float] = {}
        self._record: StepRecord | None = None
        self._evaluations: dict[type[EvaluationResult], EvaluationResult] = {}
        """Latest result of each kind."""
        self._status = JobStatus()
        self._events: deque[tuple[float, Event]] = deque(maxlen=EVENTS)
        # The run's own loop redraws: rich's refresh thread would read this state while it changes.
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> TerminalView:
        self._live.start()
        self.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def refresh(self) -> None:
        """Redraw the view."""
        self._live.update(self.render(), refresh=True)

    def step(self, record: StepRecord) -> None:
        """Show a step."""
        self._record = record
        self._losses[record.step] = record.loss
        self._rate.add(record.step, record.time)

    def evaluation(self, record: EvaluationResult) -> None:
        """Show an evaluation or a sample."""
        self._evaluations[type(record)] = record

    def event(self, event: Event) -> None:
        """Show an event."""
        self._events.append((self._clock(), event))

    def status(self, status: JobStatus) -> None:
        """Show a new status."""
        self._status = status

    def note(self, text: str) -> None:
        """Print a note above the view."""
        self._console.print(text, highlight=False, markup=False)

    def render(self) -> RenderableType:
        """Build the current view."""
        parts = [
            self._progress(),
            self._numbers(),
            *self._results(),
            Text(),
            *self._tables(),
            Text(),
            self._recent_events(),
        ]
        phase = self._status.phase
        title = Text.assemble((self._name, "bold"), " · ", (phase.lower(), PHASE_STYLES.get(phase, "cyan")))
        return Panel(
            Group(*parts),
            title=title,
            title_align="left",
            border_style="bright_black",
            padding=(0, 1),
            width=self._console.width - len("^C"),  # the terminal prints it after the view; a full line would wrap
        )

    def _tables(self) -> list[RenderableType]:
        """Build the tables of workers and incidents, side by side on wide terminals."""
        if not self._status.incidents:
            return [self._workers()]
        workers, incidents = self._workers(), _incidents(self._status.incidents)
        if self._console.width < WIDE:
            return [workers, Text(), incidents]
        side = Table.grid(padding=(0, 3))
        side.add_row(workers, incidents)
        return [side]

    def _progress(self) -> RenderableType:
        step = self._record.step if self._record else self._status.step
        remaining = self._rate.remaining(self._total)
        grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        grid.add_column(no_wrap=True, justify="right")
        grid.add_row(
            Text.assemble("step ", (f"{step:,}", "bold"), f" of {self._total:,}"),
            ProgressBar(total=self._total, completed=step),
            f"{step / self._total:.0%}",
            f"{remaining} left" if remaining is not None else "",
        )
        return grid

    def _numbers(self) -> RenderableType:
        record, status = self._record, self._status
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="bright_black", no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column(style="bright_black", no_wrap=True)
        grid.add_column(no_wrap=True)
        curve = sparkline([*self._losses.values()], max(10, min(60, self._console.width - 60)))
        loss = Text.assemble((f"{record.loss:.4f}" if record else "–", "bold"), "  ", (curve, "cyan"))
        unigram = f"{status.unigram_loss:.2f}" if status.unigram_loss is not None else "–"
        goodput = f"{status.goodput.ratio:.1%}" if status.goodput else "–"
        speed = f"{record.tokens_per_second:,.0f} tokens/s" if record else "–"
        mfu = f"{record.mfu:.1%}" if record and record.mfu is not None else "–"
        grid.add_row("loss", loss, "unigram", unigram)
        grid.add_row("speed", speed, "goodput", goodput)
        grid.add_row("step", step_parts_text(record) if record else "–", "MFU", mfu)
        grid.add_row("checkpoint", _checkpoint(status), "generation", str(status.generation or "–"))
        return grid

    def _results(self) -> list[RenderableType]:
        """Build a line each for the latest evaluation and sample."""
        return [
            Text.assemble(
                (f"{evaluation_title(record)} ", "bright_black"), f"{record.step:,}  ", evaluation_text(record),
                no_wrap=True, overflow="ellipsis",
            )
            for record in self._evaluations.values()
        ]  # fmt: skip

    def _workers(self) -> RenderableType:
        table = _table("worker", "rank", "state", "attempt", "processes")
        for worker in self._status.workers:
            table.add_row(
                str(worker.slot),
                "–" if worker.rank is None else str(worker.rank),
                Text(worker.state, style=STATE_STYLES.get(worker.state, "")),
                str(worker.attempt),
                " ".join(str(pid) for _, pid in sorted(worker.pids.items())) or "–",
            )
        return table

    def _recent_events(self) -> RenderableType:
        lines = Table.grid(padding=(0, 1, 0, 0), expand=True)
        lines.add_column(no_wrap=True, style="bright_black", min_width=len("00:00:00"))
        lines.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for moment, event in self._events:
            style = "yellow" if event.type == "Warning" else ""
            text = Text.assemble((event.reason, style or "bold"), " ", event.message)
            lines.add_row(datetime.fromtimestamp(moment).strftime("%H:%M:%S"), text)
        return lines


def _incidents(incidents: tuple[Incident, ...]) -> RenderableType:
    table = _table("incident", "worker", "step", "detected", "resumed", "steps lost")
    for incident in incidents[-INCIDENTS:]:
        table.add_row(
            incident.cause,
            "–" if incident.worker is None else str(incident.worker),
            str(incident.step),
            _seconds(incident.detected_seconds),
            _seconds(incident.resumed_seconds),
            "–" if incident.steps_lost is None else str(incident.steps_lost),
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bright_black", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _seconds(value: float | None) -> str:
    return "…" if value is None else f"{value:.2f} s"


def _checkpoint(status: JobStatus) -> str:
    found = parse_manifest_key(status.latest_checkpoint) if status.latest_checkpoint else None
    return f"step {found[1]:,}" if found else "none yet"
