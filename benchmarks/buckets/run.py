"""Benchmark of gradient reduction: buckets overlapped with backward, one reduction at the end, and DDP.

    python benchmarks/buckets/run.py [--rounds 5] [--steps 6] [--ranks 2]

Each rank is a process with one thread, over gloo on one machine. A step is forward, backward and reduction of two
micro-batches, without an optimizer. Every round runs each variant once, in alternating order.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain_api.spec.model import Model, resolve
from pretrain_trainer.models.decoder import Decoder, build, initialise
from pretrain_trainer.models.loss import Objective
from pretrain_trainer.parallelism.gradients import BUCKET_BYTES, FlatGradients, Signals

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import machine

SHAPE = resolve(Model(family="gpt2", layers=12, heads=8, width=512, context=64))
ROWS = 8192
SEQUENCES, MICRO_BATCHES = 2, 2
SECONDS_PER_STEP = Callable[[int], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=2, help="one per core, to exclude scheduling effects")
    arguments = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555", "GLOO_SOCKET_IFNAME": "lo"}
    multiprocessing.spawn(_rank, (arguments.ranks, arguments.rounds, arguments.steps), nprocs=arguments.ranks)


def _rank(rank: int, ranks: int, rounds: int, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    ways: dict[str, SECONDS_PER_STEP] = {
        "one reduction at the end": flat(1 << 40),
        f"buckets of {BUCKET_BYTES >> 20} MiB, overlapped": flat(BUCKET_BYTES),
        "torch's DDP": ddp(),
    }
    for time_steps in ways.values():
        time_steps(2)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, time_steps in list(ways.items())[:: -1 if number % 2 else 1]:
            times[name].append(time_steps(steps))
    if rank == 0:
        show(times)
    dist.destroy_process_group()


def flat(bucket_bytes: int) -> SECONDS_PER_STEP:
    """Time our all-reduce in buckets of `bucket_bytes`."""
    model = a_model()
    gradients = FlatGradients(model.parameters(), bucket_bytes)

    def step() -> None:
        gradients.begin()
        for number, windows in enumerate(micro_batches(), 1):
            gradients.add(Objective()(model, windows), last=number == MICRO_BATCHES)
        gradients.reduce(Signals(), None)

    return timed(step)


def ddp() -> SECONDS_PER_STEP:
    """Time torch's DistributedDataParallel."""
    model = a_model()
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    tail = torch.zeros(3)

    def step() -> None:
        model.zero_grad(set_to_none=False)
        for number, windows in enumerate(micro_batches(), 1):
            if number < MICRO_BATCHES:
                with parallel.no_sync():
                    Objective()(parallel, windows).backward()
            else:
                Objective()(parallel, windows).backward()
        dist.all_reduce(tail)
        nn.utils.clip_grad_norm_(model.parameters(), float("inf"))

    return timed(step)


def a_model() -> Decoder:
    model = build(SHAPE, ROWS, torch.device("cpu"))
    initialise(model, 1)
    return model


def micro_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (SEQUENCES, SHAPE.context + 1)
    return [torch.randint(ROWS, shape, generator=generator) for _ in range(MICRO_BATCHES)]


def timed(step: Callable[[], None]) -> SECONDS_PER_STEP:
    """Return a function that measures the mean seconds per step."""

    def time_steps(steps: int) -> float:
        dist.barrier()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - began) / steps

    return time_steps


def show(times: dict[str, list[float]]) -> None:
    first, *_ = times
    table = Table("variant", "ms per step, median", "minimum", "maximum", f"median of ratios to {first}")
    ratios = {
        name: statistics.median(mine / other for mine, other in zip(own, times[first], strict=True))
        for name, own in times.items()
    }
    for name, own in times.items():
        seconds = (statistics.median(own), min(own), max(own))
        table.add_row(name, *(f"{1000 * value:.0f}" for value in seconds), f"{ratios[name]:.3f}")
    console = Console()
    console.print(table)
    parameters = sum(parameter.numel() for parameter in a_model().parameters())
    print(json.dumps({"parameters": parameters, "ratios": ratios, "seconds": times, "machine": machine()}))


if __name__ == "__main__":
    main()
