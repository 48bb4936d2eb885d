"""Benchmark of overhead: step time under the agent and under plain torchrun, in alternating pairs.

    python benchmarks/overhead/run.py [--pairs 5] [--steps 300]

Ours: `pretrain run` with agents, reports of every step and an asynchronous checkpoint every 50 steps. Baseline: the
same trainer under `torchrun --standalone` with as many processes, no agent and no checkpoint before the last step. Both
are timed externally from step 50 to the last step but one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import Torchrun, machine, prepare_corpus, pretrain_run, trainer_config

FIRST = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2, help="one per core, to exclude scheduling effects")
    arguments = parser.parse_args()
    prepare_corpus()
    pairs = []
    with tempfile.TemporaryDirectory() as temporary, Console(stderr=True).status("") as status:
        config = prepared(Path(temporary) / "prepared", arguments.steps, arguments.workers)
        for number in range(arguments.pairs):
            status.update(f"pair {number + 1} of {arguments.pairs}")
            folder = Path(temporary) / str(number)
            if number % 2:  # alternate, so that drift of the machine favours neither
                plain = time_plain(folder, config, arguments.steps, arguments.workers)
                ours = time_ours(folder, arguments.steps, arguments.workers)
            else:
                ours = time_ours(folder, arguments.steps, arguments.workers)
                plain = time_plain(folder, config, arguments.steps, arguments.workers)
            pairs.append((ours, plain))
    show(pairs)


def prepared(folder: Path, steps: int, workers: int) -> Path:
    """Write the trainer's configuration by a short run of ours, with the number of timed steps."""
    pretrain_run(folder, f"--workers={workers}", f"--set=training.steps={FIRST}", "--set=training.evaluation=null")
    written = folder / "trainer.json"
    config = json.loads(written.read_text())
    config["training"]["steps"] = steps
    written.write_text(json.dumps(config))
    return written


def time_ours(folder: Path, steps: int, workers: int) -> float:
    """Measure seconds per step under the agent."""
    _, records = pretrain_run(
        folder / "ours", f"--workers={workers}", f"--set=training.steps={steps}", "--set=training.evaluation=null"
    )
    return seconds_a_step({record["step"]: record["time"] for record in records}, steps)


def time_plain(folder: Path, prepared: Path, steps: int, workers: int) -> float:
    """Measure seconds per step under plain torchrun."""
    config = trainer_config(folder / "plain", prepared, interval={"steps": 10 * steps})
    times: dict[int, float] = {}
    launcher = Torchrun(
        config,
        ("--standalone", f"--nproc-per-node={workers}"),
        lambda at, step: times.setdefault(step["step"], at),
    )
    try:
        launcher.process.wait(timeout=600)
    except subprocess.TimeoutExpired:
        sys.exit("plain torchrun did not finish within 600 s")
    finally:
        launcher.kill()
    return seconds_a_step(times, steps)


def seconds_a_step(times: dict[int, float], steps: int) -> float:
    """Compute the mean from step FIRST to the last but one, checkpoints included."""
    return (times[steps - 1] - times[FIRST]) / (steps - 1 - FIRST)


def show(pairs: list[tuple[float, float]]) -> None:
    """Print the table, then one line of JSON."""
    ratios = [ours / plain for ours, plain in pairs]
    table = Table(title="Milliseconds per step")
    for column in ("pair", "under the agent, checkpoint every 50", "plain torchrun, none", "ratio"):
        table.add_column(column, justify="right")
    for number, (ours, plain) in enumerate(pairs, 1):
        table.add_row(str(number), f"{1000 * ours:.2f}", f"{1000 * plain:.2f}", f"{ours / plain:.3f}")
    Console(width=100).print(table)
    print(f"median ratio {statistics.median(ratios):.3f}")
    print(
        json.dumps(
            {"benchmark": "overhead", "pairs": pairs, "medianRatio": statistics.median(ratios), "machine": machine()}
        )
    )


if __name__ == "__main__":
    main()
