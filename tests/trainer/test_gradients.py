"""Plain data parallel's buckets: whatever their size, the sum is that of one, and the same again after a restart."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.ranks import process_group
from pretrain_trainer.parallelism.gradients import FlatGradients, Signals
from support.trainer.world import run_ranks

RANKS = 3


def summed(environ: Mapping[str, str], bucket_bytes: int) -> tuple[list[float], float, int]:
    """(gradients, their norm, reductions begun in backward) of two micro-batches of each rank but the last.

    In the step before that every rank had one.
    """
    with process_group(Environment.of(environ)) as ranks:
        model = a_model()
        gradients = FlatGradients(model.parameters(), bucket_bytes)
        gradients.begin()
        gradients.add(model(torch.ones(5, 7)).sum(), last=True)
        gradients.reduce(Signals(), None)
        gradients.begin()
        begun = []
        reduction, dist.all_reduce = dist.all_reduce, lambda *a, **k: begun.append(k) or reduction(*a, **k)
        for number in range(2 if ranks.rank < RANKS - 1 else 0):
            gradients.add(loss_of(model, ranks.rank, number), last=number == 1)
            if number == 0:
                assert not begun, "sums of a part would be sent"
        early = len(begun)
        reduced = gradients.reduce(Signals(), None)
        return values_of(model), reduced.norm, early


def a_model() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(7, 7) for _ in range(4)))
    model[2].weight = model[0].weight  # tied: complete only when both uses are
    return model


def loss_of(model: nn.Module, rank: int, number: int) -> Tensor:
    inputs = torch.randn(5, 7, generator=torch.Generator().manual_seed(10 * rank + number))
    return model(inputs).square().sum()


def values_of(model: nn.Module) -> list[float]:
    return [value for parameter in model.parameters() for value in parameter.grad.flatten().tolist()]


@pytest.mark.parametrize("bucket_bytes", [4, 300, 1 << 20])
def test_buckets_are_reduced_during_backward_and_sum_up_alike(bucket_bytes: int) -> None:
    plain = a_model()
    sum(loss_of(plain, rank, number) for rank in range(RANKS - 1) for number in range(2)).backward()

    first, second, idle = run_ranks(RANKS, summed, bucket_bytes)
    again = run_ranks(RANKS, summed, bucket_bytes)[0]

    assert first[0] == pytest.approx(values_of(plain), rel=1e-5, abs=1e-5)
    assert (first[:2], second[:2]) == (idle[:2], idle[:2])
    assert again == first
    several = bucket_bytes < 1 << 20
    assert (first[2] > 0, second[2] > 0, idle[2]) == (several, several, 0)
