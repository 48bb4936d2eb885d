"""Benchmark of recovery: time from a kill to the next step, against plain torchrun on the same machine.

    python benchmarks/recovery/run.py [--kills 3] [--spacing 150] [--patience 150] [--memory 5] [--no-peer]

Three workers train the quickstart's model. Ours: kills of rank 0's worker (agent and rank), of another worker and of a
single rank, `--kills` times each; times come from the run's report and count from the signal. `--memory N` repeats this
with in-memory checkpoints every N steps. Plain torchrun: `--rdzv-backend=c10d` with defaults, three launchers, one
killed with its rank; the time counts from the signal to the next step of a survivor, at most `--patience` seconds.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import itertools

from harness import Torchrun, machine, prepare_corpus, pretrain_run, trainer_config

PHASES = ("detected", "reformed", "restarted", "restored", "resumed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="kills of each kind")
    parser.add_argument("--spacing", type=int, default=150, help="steps between kills")
    parser.add_argument("--patience", type=float, default=150, help="maximum seconds to wait for plain torchrun")
    parser.add_argument("--memory", type=int, metavar="N", help="repeat with checkpoint.memory every N steps")
    parser.add_argument("--no-peer", action="store_true", help="skip plain torchrun")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    prepare_corpus()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with console.status("this project"):
            ours, growing = measure_ours(folder / "ours", arguments.kills, arguments.spacing)
        if arguments.memory:
            with console.status("this project, with states in memory"):
                remembering, _ = measure_ours(
                    folder / "memory", arguments.kills, arguments.spacing,
                    f"--set=checkpoint.memory={{everySteps: {arguments.memory}}}",
                )  # fmt: skip
            ours |= {f"{name}, memory every {arguments.memory}": found for name, found in remembering.items()}
        peers = {}
        victims = () if arguments.no_peer else ((2, "another rank's launcher"), (0, "rank 0's launcher"))
        for victim, name in victims:
            with console.status(f"plain torchrun, {name} is killed: up to {arguments.patience:.0f} s"):
                config = trainer_config(
                    folder / f"peer-{victim}", folder / "ours" / "trainer.json", interval={"steps": 50}, steps=100_000
                )
                peers[name] = measure_torchrun(config, victim, arguments.patience)
    show(ours, growing, peers)


def measure_ours(out: Path, kills: int, spacing: int, *options: str) -> tuple[dict[str, list[dict]], list[float]]:
    """Measure incidents by target of the kill, and the seconds without a step of each growth."""
    # Survivors keep their order and a new worker is last. So killing slots 0, 1, 2, 0, … always kills rank 0's worker,
    # and killing the newest worker never does.
    targets = [("rank 0's worker", f"kill:worker={n % 3}") for n in range(kills)]
    targets += [("another worker", f"kill:worker={(kills - 1) % 3}")] * kills
    targets += [("a rank's process", "kill:rank=1")] * kills
    faults = [f"--fault={what},step={spacing * (n + 1)}" for n, (_, what) in enumerate(targets)]
    steps = spacing * (len(targets) + 1)
    report, records = pretrain_run(out, "--workers=3", f"--set=training.steps={steps}", *options, *faults)
    if len(report["incidents"]) != len(targets):
        sys.exit(f"{len(targets)} faults made {len(report['incidents'])} incidents: {report['incidents']}")
    ours: dict[str, list[dict]] = {}
    for (name, _), incident in zip(targets, report["incidents"], strict=True):
        ours.setdefault(name, []).append(incident)
    grown = {generation["number"] for generation in report["generations"] if generation["reason"] == "WorkerJoined"}
    growing = [
        after["time"] - before["time"]
        for before, after in itertools.pairwise(records)
        if after["generation"] != before["generation"] and after["generation"] in grown
    ]
    return ours, growing


@dataclass(frozen=True)
class Outcome:
    """Outcome of plain torchrun after the kill: `seconds` to the next step, its exit or the timeout."""

    resumed: bool
    seconds: float
    launchers_left: int

    def __str__(self) -> str:
        if self.resumed:
            return f"{self.seconds:.1f}"
        if self.launchers_left == 0:
            return f"died after {self.seconds:.0f} s"
        return f"no step within {self.seconds:.0f} s"


def measure_torchrun(config: Path, victim: int, patience: float) -> Outcome:
    """Kill one of three launchers and wait for the next step of the survivors."""
    steps: list[tuple[float, int]] = []
    stepped = threading.Condition()

    def on_step(at: float, step: dict) -> None:
        with stepped:
            steps.append((at, step["step"]))
            stepped.notify_all()

    options = (
        "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=benchmark", "--nnodes=1:3",
        "--max-restarts=100",
    )  # fmt: skip
    launchers = []
    try:
        for _ in range(3):
            launchers.append(Torchrun(config, options, on_step))
            time.sleep(2)  # The first launcher hosts the store: it is the one killed as rank 0's.
        with stepped:
            if not stepped.wait_for(lambda: len(steps) > 60, timeout=180):
                sys.exit("plain torchrun did not begin to train within 180 s")
        launchers[victim].kill()
        killed = time.time()
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and any(launcher.running for launcher in launchers):
            with stepped:
                stepped.wait(timeout=1)
                # Lines in the pipe at the time of the kill are not steps after it.
                if later := [at for at, _ in steps if at > killed + 1]:
                    return Outcome(True, later[0] - killed, sum(launcher.running for launcher in launchers))
        return Outcome(False, time.time() - killed, sum(launcher.running for launcher in launchers))
    finally:
        for launcher in launchers:
            launcher.kill()


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def show(ours: dict[str, list[dict]], growing: list[float], peers: dict[str, Outcome]) -> None:
    """Print the table, then one line of JSON."""
    medians = {
        name: {phase: statistics.median(incident[f"{phase}Seconds"] for incident in incidents) for phase in PHASES}
        for name, incidents in ours.items()
    }
    table = Table(title="Seconds from the kill (medians; each phase ends at the time given)")
    for column in ("killed", "n", "detect", "re-form", "restart", "restore", "first step", "worst", "steps lost"):
        table.add_column(column, justify="left" if column == "killed" else "right")
    for name, phases in medians.items():
        incidents = ours[name]
        worst = max(incident["resumedSeconds"] for incident in incidents)
        lost = statistics.median(incident["stepsLost"] for incident in incidents)
        table.add_row(
            name, str(len(incidents)), *(f"{phases[phase]:.3f}" for phase in PHASES), f"{worst:.3f}", f"{lost:.0f}"
        )
    if growing:
        table.add_row(
            "(growing back: no step for)", str(len(growing)), *[""] * 4, f"{statistics.median(growing):.3f}",
            f"{max(growing):.3f}", "0",
        )  # fmt: skip
    for name, outcome in peers.items():
        table.add_row(f"plain torchrun: {name}", "1", *[""] * 4, str(outcome), "", "")
    Console(width=130).print(table)
    print(
        json.dumps(
            {
                "benchmark": "recovery",
                "medians": medians,
                "growing": growing,
                "torchrun": {name: asdict(outcome) for name, outcome in peers.items()},
                "machine": machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
