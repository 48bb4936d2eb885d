"""Plain data parallel's buckets: whatever their size, the sum is that of one, and the same again after a restart."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist
from builders_trainer import run_ranks
from torch import nn

from pretrain_trainer.parallelism.gradients import FlatGradients, Signals
from pretrain_trainer.ranks import process_group

RANKS = 3


def summed(environ: Mapping[str, str], bucket_bytes: int) -> tuple[list[float], float, int]:
    """(gradients, their norm, reductions begun in backward) of two micro-batches of each rank but the last."""
    with process_group(environ) as ranks:
        torch.manual_seed(1)
        model = nn.Sequential(*(nn.Linear(7, 7) for _ in range(4)))
        model[2].weight = model[0].weight  # tied: complete only when both uses are
        gradients = FlatGradients(model.parameters(), bucket_bytes)
        gradients.begin()
        begun = []
        reduction, dist.all_reduce = dist.all_reduce, lambda *a, **k: begun.append(k) or reduction(*a, **k)
        for number in range(2 if ranks.rank < RANKS - 1 else 0):
            inputs = torch.randn(5, 7, generator=torch.Generator().manual_seed(10 * ranks.rank + number))
            gradients.add(model(inputs).square().sum(), last=number == 1)
            if number == 0:
                assert not begun, "sums of a part would be sent"
        early = len(begun)
        reduced = gradients.reduce(Signals(), None)
        values = [value for parameter in model.parameters() for value in parameter.grad.flatten().tolist()]
        return values, reduced.norm, early


@pytest.fixture(scope="module")
def in_one() -> list[float]:
    return run_ranks(RANKS, summed, 1 << 20)[0][0]


@pytest.mark.parametrize("bucket_bytes", [4, 300])
def test_buckets_are_reduced_during_backward_and_sum_up_alike(in_one: list[float], bucket_bytes: int) -> None:
    first, second, idle = run_ranks(RANKS, summed, bucket_bytes)
    again = run_ranks(RANKS, summed, bucket_bytes)[0]

    assert first[0] == pytest.approx(in_one, rel=1e-5, abs=1e-5)
    assert (first[:2], second[:2]) == (idle[:2], idle[:2])
    assert again == first
    assert (first[2] > 0, second[2] > 0, idle[2]) == (True, True, 0)
