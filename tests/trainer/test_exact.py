"""Exact mode: bit-equal at any world size and however state is laid out, and overflow counts as divergence."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain_api.checkpoint.lineage import StepRange
from pretrain_api.messages.reports import Evaluated
from pretrain_trainer.parallelism.exact import norm_of, square_scale, squares
from support.trainer.world import RankEnd, Script, a_config, a_corpus, reducing_exactly, run_ranks, run_training

FULL, HYBRID = ({"parallelism": {"shard": shard}} for shard in ("full", "hybrid"))
PASSED_OVER = Script(skipped=(StepRange(first=3, last=4), StepRange(first=9, last=9)))
LIMIT = 2.0**26 / 4
"""Of a gradient, with four micro-batches."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_corpus(tmp_path_factory.mktemp("corpus"))


def everything(corpus: Path, **changes: Any) -> dict[str, Any]:
    """Five micro-batches a step, dropout and evaluations."""
    return {
        "exact": True,
        "steps": 8,
        "model": {"family": "gpt2", "layers": 2, "heads": 2, "width": 32, "context": 16, "dropout": 0.1},
        "evaluation": {"every": 3, "sequences": 10, "sources": [{"name": "held-out", "uri": str(corpus / "held-out")}]},
    } | changes


def told(end: RankEnd) -> str:
    """A digest of all that a run says of its numbers, and of its last parameters."""
    steps = [(step.step, step.loss, step.grad_norm) for step in end.steps]
    evaluations = [(item.step, item.losses) for item in end.of(Evaluated)]
    assert len(steps) == 8
    assert len(evaluations) == 3
    return hashlib.sha256(repr((steps, evaluations, end.parameters)).encode()).hexdigest()


def test_one_hash_at_every_world_size_sharded_or_not(corpus: Path) -> None:
    plain, sharded, hybrid = (a_config(corpus, everything(corpus, **changes)) for changes in ({}, FULL, HYBRID))

    hashes = {told(run_training(plain, ranks, PASSED_OVER)[0]) for ranks in (1, 3, 5)}
    hashes |= {told(run_training(sharded, ranks, PASSED_OVER)[0]) for ranks in (1, 3, 5)}
    hashes |= {told(run_training(hybrid, ranks, PASSED_OVER, worker)[0]) for ranks, worker in ((4, 2), (3, 1))}

    assert len(hashes) == 1


@pytest.mark.parametrize("shard", [{}, FULL], ids=["plain", "sharded"])
def test_it_trains_like_fp32(corpus: Path, shard: dict[str, Any]) -> None:
    exact, plain = (run_training(a_config(corpus, {"exact": exact, **shard}), 1)[0] for exact in (True, False))

    assert exact.losses == pytest.approx(plain.losses, rel=1e-5)
    assert [step.grad_norm for step in exact.steps] == pytest.approx([step.grad_norm for step in plain.steps], rel=1e-5)


@pytest.fixture(scope="module", params=["none", "full"])
def reduced(request: pytest.FixtureRequest) -> list[list[Any]]:
    """Results of two ranks, by rank and case."""
    nan, infinity = float("nan"), float("inf")
    cases = [[LIMIT * 0.99] * 2, [1.0, LIMIT], [LIMIT, 1.0], [1.0, -LIMIT], [1.0, nan], [infinity, 1.0], [0.0, 0.0]]
    return run_ranks(2, reducing_exactly, request.param, cases)


def test_gradients_at_the_limit_do_not_wrap(reduced: list[list[Any]]) -> None:
    first, second = (results[0] for results in reduced)

    assert first.norm == pytest.approx(4 * LIMIT * 0.99 * 3**0.5)
    assert first == second


def test_an_overflow_on_one_rank_is_infinite_for_all(reduced: list[list[Any]]) -> None:
    for results in reduced:
        for result in results[1:4]:
            assert result.norm == float("inf")
            assert "does not fit the fixed point of training.exact" in result.note


def test_a_gradient_that_is_no_number_is_seen_by_all(reduced: list[list[Any]]) -> None:
    assert [result.finite for results in reduced for result in results[4:6]] == [False] * 4


def test_a_gradient_of_zero_has_no_norm(reduced: list[list[Any]]) -> None:
    assert [results[6].norm for results in reduced] == [0.0, 0.0]


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0, 1e6])
def test_the_norm_is_right_and_the_same_in_any_parts_and_order(size: float) -> None:
    gradient = torch.randn(100_003, generator=torch.Generator().manual_seed(1)) * size
    gradient[7] = 300 * size
    scale = square_scale(gradient.abs().max())
    parts = gradient[torch.randperm(len(gradient))].split([3, 70_000, 30_000])

    whole, apart = squares([gradient], scale), squares(parts, scale)

    assert torch.equal(whole, apart)
    assert float(norm_of(whole, scale)) == pytest.approx(float(gradient.double().norm()), rel=1e-7)
