"""Results of the operator benchmark, as tables and one line of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from figures import Line
from harness import machine
from process import Start
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Creation:
    """Cost of creating jobs up to this size."""

    jobs: int
    pods: int
    new_jobs: int
    new_pods: int
    accepted_seconds: float
    """From the first `create` to the last response."""
    seconds: float
    """From the first `create` to the last pod."""
    cpu_seconds: float
    """CPU seconds of the operator until it is idle."""
    api_server_cpu_seconds: float
    """CPU seconds of API server and etcd in the same time."""
    rss_bytes: int
    looks: float
    """Reconciliations."""
    p50: float
    p99: float
    calls: dict[str, float]
    """Calls per job by verb, as the operator counts them, including its Lease and lists."""
    writes: dict[str, float]
    """Writes per job by verb and resource, as the API server counts them, without the benchmark's own."""


@dataclass(frozen=True)
class Idle:
    """Cost of idle jobs."""

    jobs: int
    seconds: float
    cpu_share: float
    rss_bytes: int
    looks: float
    """Reconciliations."""
    p50: float
    p99: float
    calls: dict[str, float]
    writes: dict[str, float]


def show(creations: list[Creation], starts: dict[int, list[Start]], idle: Idle, load: tuple[float, ...]) -> None:
    """Print the tables, then one line of JSON."""
    console = Console(width=130)
    console.print(creation_table(creations))
    last = creations[-1]
    console.print("Calls per job:", counts(last.calls), "\nWrites per job:", counts(last.writes))
    console.print(start_table(creations, starts))
    lines = fitted(creations, starts)
    for name, line in lines.items():
        console.print(
            f"{name}: {line.intercept:.2f} + {line.slope * 1e3:.2f} per 1,000 pods, residual up to {line.residual:.2f}"
        )
    console.print(
        f"{idle.jobs} idle jobs, {idle.seconds:.0f} s: {idle.cpu_share:.2%} of a core, "
        f"{sum(idle.writes.values()):.0f} writes, {idle.looks:.0f} reconciles (p50 {idle.p50 * 1e3:.2f} ms, "
        f"p99 {idle.p99 * 1e3:.2f} ms), {idle.rss_bytes / 1e6:.0f} MB; calls: {counts(idle.calls)}"
    )
    print(json.dumps(summary(creations, starts, idle, lines) | {"loadBefore": [round(part, 2) for part in load]}))


def creation_table(creations: list[Creation]) -> Table:
    """Build the table of creations."""
    table = Table(title="Creating jobs, each size from the one before")
    for column in (
        "jobs", "pods", "pods/s", "accepted s", "all pods s", "reconcile p50 ms", "p99 ms", "reconciles/job", "CPU s",
        "API server's", "RSS MB",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for row in creations:
        table.add_row(
            str(row.jobs), str(row.pods), f"{row.new_pods / row.seconds:.0f}", f"{row.accepted_seconds:.1f}",
            f"{row.seconds:.1f}", f"{row.p50 * 1e3:.2f}", f"{row.p99 * 1e3:.2f}",
            f"{row.looks / row.new_jobs:.1f}", f"{row.cpu_seconds:.1f}", f"{row.api_server_cpu_seconds:.1f}",
            f"{row.rss_bytes / 1e6:.0f}",
        )  # fmt: skip
    return table


def start_table(creations: list[Creation], starts: dict[int, list[Start]]) -> Table:
    """Build the table of restarts."""
    table = Table(title="Restarting the operator")
    for column in ("jobs", "pods", "seconds", "CPU seconds"):
        table.add_column(column, justify="right")
    for row in creations:
        of_size = starts.get(row.jobs, [])
        table.add_row(
            str(row.jobs), str(row.pods), " ".join(f"{start.seconds:.2f}" for start in of_size),
            " ".join(f"{start.cpu_seconds:.2f}" for start in of_size),
        )  # fmt: skip
    return table


def summary(
    creations: list[Creation], starts: dict[int, list[Start]], idle: Idle, lines: dict[str, Line]
) -> dict[str, object]:
    """Collect all results for JSON."""
    return {
        "benchmark": "operator",
        "creations": [asdict(creation) for creation in creations],
        "starts": {size: [asdict(start) for start in of_size] for size, of_size in starts.items()},
        "startLines": {name: asdict(line) for name, line in lines.items()},
        "idle": asdict(idle),
        "machine": machine(),
    }


def counts(of: dict[str, float]) -> str:
    return ", ".join(f"{name} {count:.2f}".removesuffix(".00") for name, count in of.items()) or "none"


def fitted(creations: list[Creation], starts: dict[int, list[Start]]) -> dict[str, Line]:
    """Fit the seconds of a start over the number of pods, through all measured starts."""
    if len(creations) < 2 or not starts:
        return {}
    points = [(row.pods, start) for row in creations for start in starts[row.jobs]]
    pods = [count for count, _ in points]
    return {
        "seconds": Line.through(pods, [start.seconds for _, start in points]),
        "CPU seconds": Line.through(pods, [start.cpu_seconds for _, start in points]),
    }
