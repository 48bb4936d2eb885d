"""The data order: pure, complete, by weight, and the same at any world size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_api.checkpoint.lineage import StepRange, data_step
from pretrain_trainer.core.errors import InvalidInput
from pretrain_trainer.datasets.order import MIX_BLOCK, DataOrder, MixSource, apportion, permute
from pretrain_trainer.parallelism.forward_backward import largest_share, share

WEB, BOOKS = MixSource("web", 0.7, 113), MixSource("books", 0.3, 40)
ranges = st.lists(
    st.builds(
        lambda first, length: StepRange(first=first, last=first + length), st.integers(1, 60), st.integers(0, 20)
    ),
    max_size=5,
)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_takes_each_value_once(size: int, key: int) -> None:
    values = np.arange(size, dtype=np.uint64)

    permuted = permute(values, size, np.full(size, key, dtype=np.uint64))

    assert sorted(permuted.tolist()) == list(range(size))


def test_a_permutation_shuffles() -> None:
    values = np.arange(1000, dtype=np.uint64)
    one, other = (permute(values, 1000, np.full(1000, key, dtype=np.uint64)).astype(int) for key in (1, 2))

    assert (one == other).sum() < 10
    assert abs(np.corrcoef(np.arange(1000), one)[0, 1]) < 0.1
    assert (np.diff(one) == 1).sum() < 10


@given(seed=st.integers(0, 2**31 - 1), windows=st.tuples(st.integers(1, 9000), st.integers(1, 300)))
def test_each_window_comes_once_an_epoch(seed: int, windows: tuple[int, int]) -> None:
    """After whole mix blocks no window of a source has been trained on more than once more than another."""
    sources = [MixSource("web", 0.7, windows[0]), MixSource("books", 0.3, windows[1])]
    seen = DataOrder(sources, 7, seed).at(np.arange(2 * MIX_BLOCK, dtype=np.uint64))

    for index, source in enumerate(sources):
        counts = np.bincount(seen.windows[seen.sources == index], minlength=source.windows)
        assert len(counts) == source.windows
        assert counts.max() - counts.min() <= 1


def test_epochs_have_different_orders() -> None:
    order = DataOrder([MixSource("only", 1.0, MIX_BLOCK)], 8, 5)
    first = order.at(np.arange(MIX_BLOCK, dtype=np.uint64)).windows
    second = order.at(np.arange(MIX_BLOCK, 2 * MIX_BLOCK, dtype=np.uint64)).windows

    assert sorted(first) == sorted(second)
    assert (first == second).sum() < 20


@given(weights=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6))
def test_weights_are_met_to_within_a_place_of_each_block(weights: list[float]) -> None:
    sources = [MixSource(f"s{index}", weight, 50) for index, weight in enumerate(weights)]
    seen = DataOrder(sources, 16, 3).at(np.arange(2 * MIX_BLOCK, dtype=np.uint64))

    counts = np.bincount(seen.sources, minlength=len(weights))

    for count, weight in zip(counts, weights, strict=True):
        assert abs(count / 2 - weight / sum(weights) * MIX_BLOCK) < 1


def test_sources_are_mixed_evenly_along_the_way() -> None:
    seen = DataOrder([WEB, BOOKS], 16, 3).at(np.arange(400, dtype=np.uint64))

    assert 0.6 < (seen.sources == 0).mean() < 0.8


def test_a_source_too_light_to_be_trained_on_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"sources\[dust\].weight"):
        apportion([WEB, MixSource("dust", 1e-6, 10)])


@given(step=st.integers(1, 500), world_size=st.integers(1, 9), skipped=ranges)
def test_ranks_together_train_on_the_step_of_one_rank(step: int, world_size: int, skipped: list[StepRange]) -> None:
    order, micro_batch, total = DataOrder([WEB, BOOKS], 24, 11), 3, 8
    whole = order.of_step(step, skipped, range(24))
    parts = [share(total, rank, world_size) for rank in range(world_size)]
    read = [order.of_step(step, skipped, range(part.start * micro_batch, part.stop * micro_batch)) for part in parts]

    assert np.concatenate([part.sources for part in read]).tolist() == whole.sources.tolist()
    assert np.concatenate([part.windows for part in read]).tolist() == whole.windows.tolist()
    assert max(len(part) for part in parts) == largest_share(total, world_size)
    assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 1


@given(skipped=ranges)
def test_steps_take_all_data_but_the_skipped_ranges_in_turn(skipped: list[StepRange]) -> None:
    passed_over = {number for gap in skipped for number in range(gap.first, gap.last + 1)}
    expected = [number for number in range(1, 400) if number not in passed_over]

    assert [data_step(step, skipped) for step in range(1, 200)] == expected[:199]


def test_the_order_never_changes_between_versions() -> None:
    """Golden values: a change here changes the data order of every running job."""
    seen = DataOrder([WEB, BOOKS], 8, 1).of_step(3, (), range(8))

    assert seen.sources.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert seen.windows.tolist() == [86, 58, 27, 5, 95, 12, 108, 56]


def test_seeds_give_different_orders() -> None:
    one, other = (DataOrder([WEB, BOOKS], 100, seed).of_step(1, (), range(100)).windows for seed in (1, 2))

    assert (one == other).mean() < 0.2
