"""Benchmark of exact sums: steps with and without `training.exact`, in alternating blocks.

    python benchmarks/exact/run.py [--ranks 2] [--blocks 6] [--steps 5]

The same processes alternate between a plain and an exact model like the quickstart's: forward and backward of the
micro-batches, reduction, clipping and AdamW, with all-reduce and with FSDP2.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import machine

from pretrain_api.spec.model import Model, resolve
from pretrain_api.spec.training import Optimizer
from pretrain_trainer.core.ranks import Ranks
from pretrain_trainer.models.decoder import build, initialise
from pretrain_trainer.models.loss import Objective
from pretrain_trainer.models.optimizer import build_optimizer
from pretrain_trainer.parallelism.exact import ExactGradients, ExactShardedGradients
from pretrain_trainer.parallelism.fsdp import shard_over
from pretrain_trainer.parallelism.gradients import FlatGradients, ShardedGradients, Signals

ROWS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="one per core")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--micro-batches", type=int, default=6, help="per step, over all ranks")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=5, help="per block")
    arguments = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    torch.multiprocessing.spawn(work, (arguments, port, results), arguments.ranks)
    show(results.get(), arguments)


def work(rank: int, arguments: argparse.Namespace, port: int, results: torch.multiprocessing.SimpleQueue) -> None:
    """Run all four variants in turns; rank 0 returns seconds per step by variant and block."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=arguments.ranks)
    seconds = {}
    for shard in ("none", "full"):
        plain, exact = (Variant(Ranks(rank, arguments.ranks, torch.device("cpu")), arguments, shard, e) for e in (0, 1))
        plain.steps(2)
        exact.steps(2)
        pairs = []
        for number in range(arguments.blocks):
            order = (plain, exact) if number % 2 else (exact, plain)
            times = {variant: variant.steps(arguments.steps) for variant in order}
            pairs.append((times[plain], times[exact]))
        seconds[shard] = pairs
    if rank == 0:
        results.put(seconds)
    dist.destroy_process_group()


class Variant:
    """Model with its optimizer and gradient reduction."""

    def __init__(self, ranks: Ranks, arguments: argparse.Namespace, shard: str, exact: int) -> None:
        shape = resolve(Model(layers=arguments.layers, heads=4, width=arguments.width, context=arguments.context))
        self.model = build(shape, ROWS, ranks.device)
        initialise(self.model, 1)
        total = arguments.micro_batches
        if shard == "full":
            shard_over(self.model, init_device_mesh("cpu", (ranks.world_size,)), bf16=False)
        self.optimizer = build_optimizer(self.model, Optimizer(), bool(exact))
        self.gradients = {
            ("none", 0): lambda: FlatGradients(self.model.parameters()),
            ("none", 1): lambda: ExactGradients(self.model.parameters(), total),
            ("full", 0): lambda: ShardedGradients(self.model),
            ("full", 1): lambda: ExactShardedGradients(self.model, total, ranks.world_size),
        }[shard, exact]()
        self.passes = total // ranks.world_size
        self.windows = torch.randint(ROWS, (self.passes, 8, arguments.context + 1))
        self.weight = 1.0 / (total * 8 * arguments.context)
        self.objective = Objective()

    def steps(self, count: int) -> float:
        """Return this process's CPU seconds per step: wall-clock time means nothing on a shared machine."""
        dist.barrier()
        began = time.process_time()
        for _ in range(count):
            self.gradients.begin()
            for number, windows in enumerate(self.windows):
                loss = self.objective(self.model, windows) * self.weight
                self.gradients.add(loss, number == self.passes - 1)
            self.gradients.reduce(Signals(), 1.0)
            self.optimizer.step()
        return (time.process_time() - began) / count


def show(seconds: dict[str, list[tuple[float, float]]], arguments: argparse.Namespace) -> None:
    """Print the table, then one line of JSON."""
    table = Table(
        title=f"CPU milliseconds per step of rank 0, medians of {arguments.blocks} blocks of {arguments.steps} steps"
    )
    for column in ("sums by", "plain", "exact", "exact / plain, median", "lowest", "highest"):
        table.add_column(column, justify="right")
    figures = {}
    for shard, pairs in seconds.items():
        ratios = sorted(exact / plain for plain, exact in pairs)
        plain, exact = (1000 * statistics.median(pair[index] for pair in pairs) for index in (0, 1))
        figures[shard] = {"plainMs": plain, "exactMs": exact, "ratio": statistics.median(ratios), "ratios": ratios}
        name = {"none": "all-reduce", "full": "FSDP2"}[shard]
        cells = (plain, exact, statistics.median(ratios), ratios[0], ratios[-1])
        table.add_row(name, *(f"{value:.{1 if value > 5 else 2}f}" for value in cells))
    Console(width=100).print(table)
    print(json.dumps({"benchmark": "exact", "figures": figures, "machine": machine()}))


if __name__ == "__main__":
    main()
