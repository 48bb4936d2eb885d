"""The detector on curves with and without a divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from pretrain_api.checkpoint.lineage import LossMemory
from pretrain_trainer.stability.detector import StepVerdict, forget_normal, judge

Curve = Callable[[np.random.Generator, np.ndarray], tuple[np.ndarray, np.ndarray]]
STEPS = 400
SEEDS = 10


@dataclass(frozen=True)
class Found:
    """Result of a curve: the first divergence, and the number of outliers."""

    cause: str | None
    step: int
    since: int
    outliers: int


def judged(losses: Sequence[float], norms: Sequence[float], threshold: float = 5.0) -> list[StepVerdict]:
    """The verdicts, step by step, up to the first divergence."""
    watch, verdicts = LossMemory(), []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
        verdicts.append(judge(watch, step, loss, norm, threshold=threshold, total_steps=len(losses)))
        watch = verdicts[-1].watch
        if verdicts[-1].cause:
            break
    return verdicts


def found(losses: Sequence[float], norms: Sequence[float]) -> Found:
    verdicts = judged(losses, norms)
    last = verdicts[-1]
    return Found(last.cause, last.step, last.since, sum(verdict.finding == "outlier" for verdict in verdicts))


def learning(random: np.random.Generator, step: np.ndarray, noise: float, start: float = 10.8) -> np.ndarray:
    """A loss that falls by a power of the step, with a noise in nats."""
    return 2.4 + (start - 2.4) * (1 + step / 15) ** -0.7 + noise * random.standard_normal(len(step))


def norms(random: np.random.Generator, step: np.ndarray, spread: float = 0.25) -> np.ndarray:
    """Norms that fall from a few to less than one, with heavy tails: one in 60 is some times as large."""
    usual = (0.3 + 4 * np.exp(-step / 10)) * np.exp(spread * random.standard_normal(len(step)))
    return np.where(random.random(len(step)) < 1 / 60, usual * random.uniform(2, 8, len(step)), usual)


def smooth(random: np.random.Generator, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A large batch."""
    return learning(random, step, 0.01), norms(random, step, 0.1)


def noisy(random: np.random.Generator, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A small batch."""
    return learning(random, step, 0.25), norms(random, step, 0.5)


def heavy_tails(random: np.random.Generator, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Batches that now and then hold a hard document."""
    return learning(random, step, 0.0) + 0.05 * random.standard_t(2, len(step)), norms(random, step)


def bouncing_warm_up(random: np.random.Generator, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The learning rate passes its best for a while, as at the end of many a warm-up: a hump of a third of a nat."""
    hump = 0.35 * np.exp(-(((step - 60) / 15) ** 2))
    return learning(random, step, 0.1) + hump, norms(random, step) * (1 + 2 * np.exp(-(((step - 60) / 15) ** 2)))


def flat(random: np.random.Generator, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nothing left to learn, all but without noise."""
    return 0.01 + 1e-4 * random.random(len(step)), np.full(len(step), 1e-3)


def annealed(random: np.random.Generator, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The loss drops at the end, where the learning rate decays."""
    return learning(random, step, 0.05) - 0.3 * np.maximum(0, step - 300) / 100, norms(random, step)


@pytest.mark.parametrize("curve", [smooth, noisy, heavy_tails, bouncing_warm_up, flat, annealed])
def test_learning_is_no_divergence(curve: Curve) -> None:
    for seed in range(SEEDS):
        random = np.random.default_rng(seed)
        verdict = found(*(values.tolist() for values in curve(random, np.arange(1, STEPS + 1))))

        assert verdict.cause is None, (seed, verdict)
        assert verdict.outliers < STEPS / 20


def spike(height: float, length: int) -> Curve:
    """A loss that jumps at step 200 and comes down again after some steps."""

    def curve(random: np.random.Generator, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        up = (step >= 200) & (step < 200 + length)
        return learning(random, step, 0.05) + height * up, norms(random, step) * np.where(up, 4, 1)

    return curve


def explosion(random: np.random.Generator, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A learning rate that is too high from step 200 on: the loss climbs for a few dozen steps and stays."""
    climb = 4 * np.clip((step - 199) / 30, 0, 1)
    return learning(random, step, 0.05) + climb, norms(random, step) * (1 + 20 * climb)


def early_explosion(random: np.random.Generator, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same where the loss still falls steeply, as with too short a warm-up."""
    climb = 5 * np.clip((step - 29) / 20, 0, 1)
    return learning(random, step, 0.1) + climb, norms(random, step) * (1 + 5 * climb)


def only_norms(random: np.random.Generator, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradients that explode before the loss does."""
    return learning(random, step, 0.05), norms(random, step, 0.2) * np.where(step >= 200, 100, 1)


@pytest.mark.parametrize(
    ("curve", "begins", "within"),
    [
        (spike(1.0, 30), 200, 6),
        (spike(4.0, 8), 200, 6),
        (explosion, 200, 20),
        (early_explosion, 30, 25),
        (only_norms, 200, 6),
    ],
    ids=["a spike of a nat", "a short high spike", "an explosion", "an early explosion", "norms alone"],
)
def test_a_spike_is_detected_with_its_first_step(curve: Curve, begins: int, within: int) -> None:
    for seed in range(SEEDS):
        random = np.random.default_rng(seed)
        verdict = found(*(values.tolist() for values in curve(random, np.arange(1, STEPS + 1))))

        assert verdict.cause == "LossSpike", (seed, verdict)
        assert begins - 10 < verdict.since <= verdict.step <= begins + within, (seed, verdict)  # a hard batch before it


def test_one_bad_batch_is_an_outlier_and_no_spike() -> None:
    random = np.random.default_rng(1)
    verdict = found(*(values.tolist() for values in spike(5.0, 2)(random, np.arange(1, STEPS + 1))))

    assert verdict.cause is None
    assert verdict.outliers >= 2


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_a_value_that_is_not_finite_is_a_divergence_from_the_first_step(loss: float, norm: float) -> None:
    assert found([loss], [norm]) == Found("LossNotFinite", 1, 1, 0)


def test_a_restored_memory_gives_the_same_verdicts() -> None:
    random = np.random.default_rng(3)
    losses, sizes = (values.tolist() for values in spike(1.0, 30)(random, np.arange(1, STEPS + 1)))
    watch, written = LossMemory(), LossMemory()
    for step, (loss, norm) in enumerate(zip(losses, sizes, strict=True), start=1):
        verdict = judge(watch, step, loss, norm, threshold=5.0, total_steps=STEPS)
        again = judge(written, step, loss, norm, threshold=5.0, total_steps=STEPS)
        assert again == verdict
        watch, written = verdict.watch, LossMemory.from_json(verdict.watch.to_json())
        assert len(watch.to_json()) < 4000


def test_the_baseline_can_be_reset() -> None:
    verdicts = judged([3.0] * 40 + [9.0] * 9, [1.0] * 49)
    watch = forget_normal(verdicts[-1].watch)
    for step in range(50, 80):
        verdict = judge(watch, step, 9.0, 1.0, threshold=5.0, total_steps=200)
        watch = verdict.watch
        assert verdict.finding == "normal"


def test_a_loss_that_is_not_lower_for_a_fifth_of_the_run_is_a_plateau_once() -> None:
    falling = [5.0 - 0.002 * step for step in range(1, 501)]
    verdicts = judged([*falling, *[4.05] * 2000], [1.0] * 2500)

    assert [verdict.step for verdict in verdicts if verdict.plateau] == [1000]
    assert not any(verdict.plateau for verdict in judged([6.0 - 0.002 * step for step in range(2500)], [1.0] * 2500))
