"""Exact mode: bit-equal at any world size, and overflow is refused."""

from pathlib import Path

import pytest
from builders_trainer import RankEnd, a_config, a_corpus, reducing_exactly, run_ranks, run_training


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_corpus(tmp_path_factory.mktemp("corpus"))


def test_all_world_sizes_come_to_the_same_bits(corpus: Path) -> None:
    config = a_config(corpus, {"exact": True, "steps": 12})

    ends: list[RankEnd] = [run_training(config, world_size)[0] for world_size in (1, 2, 3, 5)]

    assert len({end.parameters for end in ends}) == 1
    assert len({tuple(end.losses) for end in ends}) == 1
    assert len({tuple(step.grad_norm for step in end.steps) for end in ends}) == 1


def test_it_trains_like_fp32(corpus: Path) -> None:
    exact, plain = (run_training(a_config(corpus, {"exact": exact}), 1)[0].losses for exact in (True, False))

    assert exact == pytest.approx(plain, rel=1e-5)


def test_gradients_at_the_limit_do_not_wrap() -> None:
    limit = 2.0**26 / 4

    results = run_ranks(2, reducing_exactly, [limit * 0.99, limit * 0.99])

    assert results[0].norm == pytest.approx(4 * limit * 0.99 * 3**0.5)
    assert results[0] == results[1]


def test_an_overflow_on_one_rank_is_refused_by_all() -> None:
    results = run_ranks(2, reducing_exactly, [1.0, 2.0**26 / 4])

    assert all("lower training.optimizer.learningRate" in result for result in results)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_seen_by_all(bad: float) -> None:
    results = run_ranks(2, reducing_exactly, [1.0, bad])

    assert [result.finite for result in results] == [False, False]
