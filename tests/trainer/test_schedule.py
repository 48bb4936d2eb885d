"""The learning rate by step."""

import pytest

from pretrain_api.training import Schedule, Training
from pretrain_trainer.schedule import learning_rate, total_steps


def rates(total: int, **fields: object) -> list[float]:
    schedule = Schedule.model_validate(fields)
    return [learning_rate(schedule, 1.0, step, total) for step in range(1, total + 1)]


def test_warm_up_rises_linearly_to_the_peak() -> None:
    assert rates(20, kind="constant", warmupSteps=4)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_the_last_step_has_the_lowest_rate(kind: str) -> None:
    found = rates(50, kind=kind, warmupSteps=5, minRatio=0.2)

    assert found[-1] == pytest.approx(0.2)
    assert min(found[5:]) == found[-1]
    assert found[4] == 1.0


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert rates(100, kind="cosine", warmupSteps=0, minRatio=0.1)[49] == pytest.approx(0.55)


def test_linear_falls_by_equal_amounts() -> None:
    assert rates(4, kind="linear", minRatio=0.0) == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_wsd_is_stable_until_the_last_decay() -> None:
    found = rates(20, kind="wsd", warmupSteps=2, minRatio=0.0, decaySteps=4)

    assert found[2:16] == [1.0] * 14
    assert found[16:] == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_a_warm_up_longer_than_the_run_is_cut_off() -> None:
    assert rates(3, kind="cosine", warmupSteps=10) == pytest.approx([0.1, 0.2, 0.3])


def test_tokens_make_steps_rounded_up() -> None:
    fields = {
        "model": {"preset": "gpt2-tiny"},
        "data": {"tokenizer": "t", "sources": [{"name": "a", "uri": "a"}]},
        "batch": {"sequences": 10, "microBatch": 2},
    }

    assert total_steps(Training.model_validate(fields | {"tokens": 3201}), context=32) == 11
    assert total_steps(Training.model_validate(fields | {"steps": 7}), context=32) == 7
