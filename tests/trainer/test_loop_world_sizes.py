"""The same losses at every step, whatever the number of ranks."""

from pathlib import Path

import pytest
from builders_trainer import RankEnd, a_config, a_corpus, run_training

SHARDED = {"parallelism": {"shard": "full"}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def alone(corpus: Path) -> RankEnd:
    return run_training(a_config(corpus), 1)[0]


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_plain_data_parallel_has_the_losses_of_one_process(corpus: Path, alone: RankEnd, world_size: int) -> None:
    ends = run_training(a_config(corpus), world_size)

    assert ends[0].losses == pytest.approx(alone.losses, rel=1e-5)
    assert len({end.parameters for end in ends}) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_fsdp2_has_the_losses_of_one_process(corpus: Path, alone: RankEnd, world_size: int) -> None:
    sharded = run_training(a_config(corpus, SHARDED), world_size)[0]

    assert sharded.losses == pytest.approx(alone.losses, rel=1e-5)
    assert [step.grad_norm for step in sharded.steps] == pytest.approx(
        [step.grad_norm for step in alone.steps], rel=1e-4
    )


def test_the_same_world_size_is_bit_equal(corpus: Path) -> None:
    one, other = (run_training(a_config(corpus), 2)[0] for _ in range(2))

    assert one.losses == other.losses
    assert one.parameters == other.parameters


def test_dropout_does_not_depend_on_the_world_size(corpus: Path, alone: RankEnd) -> None:
    model = {"family": "gpt2", "layers": 2, "heads": 2, "width": 32, "context": 16, "dropout": 0.1}

    one, three = (run_training(a_config(corpus, {"model": model}), ranks)[0].losses for ranks in (1, 3))

    assert three == pytest.approx(one, rel=1e-5)
    assert one != pytest.approx(alone.losses, rel=1e-3)


def test_bf16_comes_near_fp32(corpus: Path, alone: RankEnd) -> None:
    for parallelism in ({"shard": "none"}, {"shard": "full"}):
        settings = {"precision": "bf16", "parallelism": parallelism, "steps": 3}

        assert run_training(a_config(corpus, settings), 2)[0].losses == pytest.approx(alone.losses[:3], rel=1e-2)
