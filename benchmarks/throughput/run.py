"""Benchmark of throughput: our trainer against a plain PyTorch loop like nanoGPT, in alternating pairs.

    python benchmarks/throughput/run.py [--pairs 4] [--steps 11]                               # a CPU
    python benchmarks/throughput/run.py --preset gpt2-124m --micro-batch 16 --micro-batches 8  # a GPU
    python benchmarks/throughput/run.py --preset llama-1b --context 2048 --micro-batch 4 --micro-batches 8

Ours is the whole trainer: `train()` with its data order, divergence detector and reports of every step; its only
checkpoint comes after the last timed step. The plain loop in `plain.py` supports the gpt2 family. The baseline for
llama is torchtitan, if installed and given by --titan. One process, one device.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import plain
from harness import ROOT, machine, prepare_corpus

from pretrain_api.estimate.flops import flops_per_token
from pretrain_api.messages.reports import ReportBody, StepDone
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_api.spec.model import ResolvedModel, resolve
from pretrain_sdk.rank_link import UnattendedLink
from pretrain_trainer.checkpoint import Checkpointer
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.loop.train import train

WARM_STEPS = 5
TITAN_SECONDS = 1800


@dataclass
class Watch(UnattendedLink):
    """Link that records the time and MFU of each reported step."""

    times: list[float] = field(default_factory=list)
    mfu: float | None = None

    def report(self, body: ReportBody) -> None:
        if isinstance(body, StepDone):
            self.times.append(now())
            self.mfu = body.mfu


def now() -> float:
    """Return wall-clock seconds, or CPU seconds of this process on a CPU."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", help="preset of the model; default: 4 layers, width 256, context 128")
    parser.add_argument("--context", type=int)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--titan", help="command that trains the same shape with torchtitan; shows its tps")
    arguments = parser.parse_args()
    prepare_corpus()
    config = configured(arguments)
    shape = resolve(config.training.model)
    rows = shape.embedding_rows(json.loads(Path(plain.SOURCE / "dataset.json").read_text())["vocabulary"])
    tokens = config.training.tokens_per_step
    pairs, mfu = [], None
    for number in range(arguments.pairs):
        turns = [lambda: ours(config), lambda: (plain_steps(arguments, shape, rows), None)]
        if shape.family != "gpt2":
            turns = turns[:1]
        order = sorted(
            range(len(turns)), reverse=number % 2 == 0
        )  # alternate, so that drift of the machine favours neither
        results = {index: turns[index]() for index in order}
        mfu = results[0][1] or mfu
        pairs.append((results[0][0], results[1][0] if len(turns) > 1 else None))
    show(pairs, tokens, flops_per_token(shape, rows), mfu, titan(arguments.titan))


def configured(arguments: argparse.Namespace) -> TrainerConfig:
    """Build the configuration of a run over the quickstart's corpus."""
    own = {"family": "gpt2", "layers": 4, "heads": 4, "width": 256, "context": 128}
    model = {"preset": arguments.preset} if arguments.preset else own
    if arguments.context:
        model["context"] = arguments.context
    return TrainerConfig.model_validate(
        {
            "job_name": "throughput",
            "job_uid": "throughput",
            "threads": arguments.threads,
            "training": {
                "model": model,
                "data": {
                    "tokenizer": str(ROOT / "examples/data/tokenizer.json"),
                    "sources": [{"name": "code", "uri": str(plain.SOURCE)}],
                },
                "steps": arguments.steps,
                "batch": {
                    "sequences": arguments.micro_batch * arguments.micro_batches,
                    "microBatch": arguments.micro_batch,
                },
                "precision": "bf16" if torch.cuda.is_available() else "fp32",
                "compile": arguments.compile,
            },
            "checkpoint": {"storage": {"path": "/nowhere"}, "interval": {"steps": 10**6}},
        }
    )


def ours(config: TrainerConfig) -> tuple[float, float | None]:
    """Measure seconds per step and MFU of our trainer."""
    link, environ = Watch(), without_ranks(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        storage = config.checkpoint.storage.model_copy(update={"path": folder})
        checkpoint = config.checkpoint.model_copy(update={"storage": storage})
        train(config.model_copy(update={"checkpoint": checkpoint}), link, Checkpointer.open, Environment.of(environ))
    return (link.times[-1] - link.times[WARM_STEPS]) / (len(link.times) - 1 - WARM_STEPS), link.mfu


def without_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """Remove the variables that make this process a rank."""
    return {name: value for name, value in environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}


def plain_steps(arguments: argparse.Namespace, shape: ResolvedModel, rows: int) -> float:
    """Measure seconds per step of the plain loop."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(arguments.threads)
    times: list[float] = []
    run = plain.PlainLoop(shape, rows, arguments.micro_batch, arguments.micro_batches, device, arguments.compile)
    run.train(arguments.steps, lambda: times.append(now()))
    return (times[-1] - times[WARM_STEPS]) / (len(times) - 1 - WARM_STEPS)


def titan(command: str | None) -> float | None:
    """Run torchtitan and return the last tokens/s that it prints."""
    if command is None:
        return None
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=TITAN_SECONDS)
    found = [line.split("tps:")[1].split()[0] for line in (done.stdout + done.stderr).splitlines() if "tps:" in line]
    if not found:
        sys.exit(f"{command} printed no tps:\n{(done.stdout + done.stderr)[-3000:]}")
    return float(found[-1].replace(",", ""))


def show(
    pairs: list[tuple[float, float | None]], tokens: int, flops: int, mfu: float | None, tps: float | None
) -> None:
    """Print the table, then one line of JSON. A ratio above 1 means that ours is faster."""
    table = Table(title="Milliseconds per step (on a CPU: CPU time)")
    for column in ("pair", "ours", "plain PyTorch", "speed, ours / plain"):
        table.add_column(column, justify="right")
    ratios = []
    for number, (mine, other) in enumerate(pairs, 1):
        ratios += [other / mine] if other else []
        beside = (f"{1000 * other:.2f}", f"{other / mine:.3f}") if other else ("", "")
        table.add_row(str(number), f"{1000 * mine:.2f}", *beside)
    Console(width=100).print(table)
    speed = tokens / statistics.median(mine for mine, _ in pairs)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    figures = {
        "medianRatio": statistics.median(ratios) if ratios else None,
        "tokensPerSecond": speed,
        "gflopPerSecond": speed * flops / 1e9,
        "mfu": mfu,
        "torchtitanTokensPerSecond": tps,
    }
    print(", ".join(f"{name} {value:.3f}" for name, value in figures.items() if value is not None), f"({device})")
    print(json.dumps({"benchmark": "throughput", **figures, "pairs": pairs, "device": device, "machine": machine()}))


if __name__ == "__main__":
    main()
