"""Validation losses, the same at any world size."""

import math
from pathlib import Path

import pytest

from pretrain_api.messages.reports import Evaluated, Evaluating, Restored, Sampled
from support.trainer.world import VOCABULARY, a_config, a_corpus, run_training


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_corpus(tmp_path_factory.mktemp("corpus"))


def evaluation(corpus: Path, every: int) -> dict[str, object]:
    sources = [{"name": name, "uri": str(corpus / name)} for name in ("held-out", "code")]
    return {"every": every, "sequences": 10, "sources": sources}


def evaluated(corpus: Path, world_size: int, every: int = 4, **training: object) -> list[Evaluated]:
    config = a_config(corpus, {"evaluation": evaluation(corpus, every), "exact": True} | training)
    return run_training(config, world_size)[0].of(Evaluated)


def test_losses_are_bit_equal_at_any_world_size(corpus: Path) -> None:
    alone, *others = ([item.losses for item in evaluated(corpus, world_size)] for world_size in (1, 2, 3))

    assert others == [alone, alone]
    assert all(0 < loss < math.log(VOCABULARY) for loss in alone[0].values())


def test_a_sharded_model_evaluates_alike(corpus: Path) -> None:
    alone = evaluated(corpus, 1)[-1].losses
    sharded = evaluated(corpus, 3, exact=False, parallelism={"shard": "full"})[-1].losses

    assert sharded == pytest.approx(alone, rel=1e-4)


def test_it_comes_at_the_interval_and_once_at_the_end(corpus: Path) -> None:
    assert [item.step for item in evaluated(corpus, 1, every=4)] == [4, 6]
    assert [item.step for item in evaluated(corpus, 1, every=3)] == [3, 6]


def test_a_tiny_text_is_learned_and_beats_its_unigram_model(corpus: Path) -> None:
    learning = {
        "steps": 120,
        "evaluation": evaluation(corpus, 200),
        "sampling": {"prompt": "w1 w3", "tokens": 12},
        "data": {
            "tokenizer": str(corpus / "tokenizer.json"),
            "sources": [{"name": "held-out", "uri": str(corpus / "held-out")}],
        },
    }
    end = run_training(a_config(corpus, learning), 1)[0]
    unigram, loss = end.of(Restored)[0].unigram_loss, end.losses[-1]

    assert unigram == pytest.approx(math.log(VOCABULARY), rel=0.02)
    assert loss < unigram - 2.5
    assert end.of(Evaluated)[-1].losses["held-out"] == pytest.approx(loss, rel=0.1)
    assert len(end.of(Sampled)[0].text.split()) == 12


@pytest.mark.parametrize("parallelism", [{"shard": "none"}, {"shard": "full"}])
def test_sampling_writes_the_same_at_any_world_size(corpus: Path, parallelism: dict[str, str]) -> None:
    sampling = {"sampling": {"tokens": 8, "every": 1}, "parallelism": parallelism, "steps": 3, "exact": True}

    one, two = (run_training(a_config(corpus, sampling), world_size)[0].of(Sampled) for world_size in (1, 2))

    assert one == two
    assert len({item.text for item in one}) > 1


def test_texts_come_at_the_interval_and_once_at_the_end_one_for_each_prompt(corpus: Path) -> None:
    def texts(**sampling: object) -> list[Sampled]:
        config = a_config(corpus, {"sampling": {"tokens": 3} | sampling})
        return run_training(config, 1)[0].of(Sampled)

    several = texts(every=4, prompts=["w1 w3", "w5"])
    assert [(item.step, item.number, item.prompt) for item in several] == [
        (step, number, prompt) for step in (4, 6) for number, prompt in enumerate(("w1 w3", "w5"))
    ]
    assert [item.step for item in texts(every=3)] == [3, 6]
    assert [item.step for item in texts()] == [6]


def test_evaluation_and_sampling_leave_training_unchanged(corpus: Path) -> None:
    """With dropout, so that a model left in evaluation mode or a changed generator would show."""
    looked_at = {
        "evaluation": evaluation(corpus, 1),
        "sampling": {"every": 1, "tokens": 3, "prompts": ["w1", "w2"]},
    }
    model = {"family": "gpt2", "layers": 2, "heads": 2, "width": 32, "context": 16, "dropout": 0.1}

    plain, watched = (run_training(a_config(corpus, {"model": model} | more), 2)[0] for more in ({}, looked_at))

    assert watched.losses == plain.losses
    assert watched.parameters == plain.parameters
    assert [item.step for item in watched.of(Evaluating)] == [step for step in range(1, 7) for _ in range(2)]
