"""The same losses at every step, whatever the number of ranks."""

from pathlib import Path
from typing import Any

import pytest

from support.trainer.world import RankEnd, a_config, a_corpus, run_training

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


LLAMA = {"model": {"family": "llama", "layers": 2, "heads": 4, "kvHeads": 2, "width": 32, "context": 16}}


@pytest.mark.parametrize("parallelism", [{"shard": "none"}, {"shard": "full"}], ids=["plain", "sharded"])
def test_a_llama_has_the_losses_of_one_process(corpus: Path, parallelism: dict[str, str]) -> None:
    alone = run_training(a_config(corpus, LLAMA | {"steps": 20}), 1)[0].losses
    apart = run_training(a_config(corpus, LLAMA | {"steps": 20, "parallelism": parallelism}), 3)[0].losses

    assert apart == pytest.approx(alone, rel=1e-5)
    assert alone[-1] < 0.8 * alone[0]


def test_exact_sums_of_a_llama_are_the_same_bits(corpus: Path) -> None:
    one, three = (run_training(a_config(corpus, LLAMA | {"exact": True}), ranks)[0] for ranks in (1, 3))

    assert three.parameters == one.parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": {"kind": "wsd", "warmupSteps": 2, "decaySteps": 2}},
        {"optimizer": {"kind": "sgd", "learningRate": 0.05}},
    ],
    ids=["wsd", "sgd"],
)
def test_other_schedules_and_optimizers_have_the_losses_of_one_process(corpus: Path, changes: dict[str, Any]) -> None:
    one, three = (run_training(a_config(corpus, changes), ranks)[0].losses for ranks in (1, 3))

    assert three == pytest.approx(one, rel=1e-5)
    assert one[-1] < one[0]


def test_bf16_comes_near_fp32(corpus: Path, alone: RankEnd) -> None:
    for parallelism in ({"shard": "none"}, {"shard": "full"}):
        settings = {"precision": "bf16", "parallelism": parallelism, "steps": 3}

        assert run_training(a_config(corpus, settings), 2)[0].losses == pytest.approx(alone.losses[:3], rel=1e-2)
