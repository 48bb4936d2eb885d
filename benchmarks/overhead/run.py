"""What the machinery costs: step time of a job beside the same loop under plain torchrun, in alternating pairs.

    python benchmarks/overhead/run.py [--pairs 5] [--steps 300]

Ours: `pretrain run` with agents, reports of every step and an asynchronous checkpoint every 50 steps. Beside it: the
same trainer started by `torchrun --standalone` with as many processes, no agent and no checkpoint before the last
step. Both are timed from step 50 to the last but one, from the outside.
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
    parser.add_argument("--workers", type=int, default=2, help="one a core, or scheduling is what is measured")
    arguments = parser.parse_args()
    prepare_corpus()
    pairs = []
    with tempfile.TemporaryDirectory() as temporary, Console(stderr=True).status("") as status:
        config = prepared(Path(temporary) / "prepared", arguments.steps, arguments.workers)
        for number in range(arguments.pairs):
            status.update(f"pair {number + 1} of {arguments.pairs}")
            folder = Path(temporary) / str(number)
            if number % 2:  # a machine that grows slower or faster favours neither
                plain = time_plain(folder, config, arguments.steps, arguments.workers)
                ours = time_ours(folder, arguments.steps, arguments.workers)
            else:
                ours = time_ours(folder, arguments.steps, arguments.workers)
                plain = time_plain(folder, config, arguments.steps, arguments.workers)
            pairs.append((ours, plain))
    show(pairs)


def prepared(folder: Path, steps: int, workers: int) -> Path:
    """The trainer's configuration as a short run of ours writes it, for as many steps as are timed."""
    pretrain_run(folder, f"--workers={workers}", f"--set=training.steps={FIRST}", "--set=training.evaluation=null")
    written = folder / "trainer.json"
    config = json.loads(written.read_text())
    config["training"]["steps"] = steps
    written.write_text(json.dumps(config))
    return written


def time_ours(folder: Path, steps: int, workers: int) -> float:
    """Seconds a step under the agent."""
    _, records = pretrain_run(
        folder / "ours", f"--workers={workers}", f"--set=training.steps={steps}", "--set=training.evaluation=null"
    )
    return seconds_a_step({record["step"]: record["time"] for record in records}, steps)


def time_plain(folder: Path, prepared: Path, steps: int, workers: int) -> float:
    """Seconds a step under plain torchrun."""
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
    """Mean from step FIRST to the last but one, checkpoints included."""
    return (times[steps - 1] - times[FIRST]) / (steps - 1 - FIRST)


def show(pairs: list[tuple[float, float]]) -> None:
    """The table for people, then one line of JSON."""
    ratios = [ours / plain for ours, plain in pairs]
    table = Table(title="Milliseconds a step")
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
