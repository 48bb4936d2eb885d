"""A diverging loss in real ranks with real checkpoints: rollback, skipped data, and the end of the job."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from pretrain_api.checkpoint.lineage import (
    LineageRecord,
    Manifest,
    MemoryState,
    Rollback,
    StepRange,
    manifest_key,
    record_key,
)
from pretrain_api.messages.reports import Diverged, Failed, Finished, NumberTaken, Restored, RolledBack
from pretrain_api.messages.trainer_config import ExitCode, TrainerConfig
from pretrain_api.spec.job import Checkpoint, Memory
from pretrain_sdk.scratch import MEMORY_VARIABLE
from pretrain_store.directory import DirectoryStore
from pretrain_store.history import read_listing
from pretrain_store.lineage import checkpoint_chain
from support.store.moto import Bucket, moto
from support.trainer.poison import CONTEXT, EVERY, POISON, SEQUENCES, STEPS, a_poisoned_corpus
from support.trainer.world import RankEnd, Script, a_config, run_training

SKIP = 16
SKIPPED = StepRange(first=36, last=51)
"""A quarter of SKIP lies before the first of them."""
SHARDED = {"parallelism": {"shard": "full"}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_poisoned_corpus(tmp_path_factory.mktemp("corpus"))


@dataclass(frozen=True)
class NanAt:
    """A NaN in one micro-batch of one of two ranks, once: as of an accelerator that errs. Or another factor."""

    step: int
    rank: int
    factor: float = math.nan

    def __call__(self, rank: int, computed: int, windows: Tensor) -> float:
        micro_batches = SEQUENCES // 2 // 2
        return self.factor if (rank, computed) == (self.rank, (self.step - 1) * micro_batches) else 1.0


def a_job(corpus: Path, out: Path, source: str = "poisoned", training: Any = None, **divergence: Any) -> TrainerConfig:
    return a_config(
        corpus,
        {
            "model": {"family": "gpt2", "layers": 1, "heads": 2, "width": 32, "context": CONTEXT},
            "data": {
                "tokenizer": str(corpus / "tokenizer.json"),
                "sources": [{"name": "prose", "uri": str(corpus / source), "weight": 1.0}],
            },
            "steps": STEPS,
            "seed": 0,
            "batch": {"sequences": SEQUENCES, "microBatch": 2},
        }
        | (training or {}),
        checkpoint={"storage": {"path": str(out)}, "interval": {"steps": EVERY}},
        divergence={"skipSteps": SKIP} | divergence,
    )


def trained(
    config: TrainerConfig, workers: int, generation: int = 1, worker_size: int = 1, **script: Any
) -> list[RankEnd]:
    return run_training(config, workers, Script(generation=generation, real=True, **script), worker_size)


def final_loss(end: RankEnd) -> float:
    return float(np.mean(end.losses[-5:]))


def record_of(out: Path, generation: int) -> LineageRecord:
    return LineageRecord.from_json((out / record_key(generation)).read_text())


def manifest_of(out: Path, generation: int, step: int) -> Manifest:
    return Manifest.from_json((out / manifest_key(generation, step)).read_text())


@pytest.fixture(scope="module")
def clean(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RankEnd:
    """The undisturbed run."""
    return trained(a_job(corpus, tmp_path_factory.mktemp("clean"), "clean"), 1)[0]


def test_learning_and_the_end_of_it_are_no_divergence(clean: RankEnd) -> None:
    assert clean.step_numbers == list(range(1, STEPS + 1))
    assert not clean.of(Diverged)
    assert final_loss(clean) < 0.7 * clean.losses[0]


def rollback_of(ends: list[RankEnd]) -> Rollback:
    """The one that all ranks report."""
    said = [end.of(RolledBack) for end in ends]
    assert all(len(reports) == 1 for reports in said)
    assert len({reports[0].rollback.to_json() for reports in said}) == 1, "the ranks disagree"
    return said[0][0].rollback


@pytest.fixture(scope="module")
def rolled_back(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RankEnd]]:
    """A run on poisoned data, and where its checkpoints are."""
    out = tmp_path_factory.mktemp("rolled-back")
    return out, trained(a_job(corpus, out), 2)


def test_poisoned_data_is_rolled_back_and_skipped(rolled_back: tuple[Path, list[RankEnd]], clean: RankEnd) -> None:
    out, ends = rolled_back
    rollback = rollback_of(ends)
    assert (rollback.cause, rollback.since, rollback.to_step, rollback.skipped) == ("LossSpike", 40, 30, SKIPPED)
    assert ends[0].step_numbers == [*range(1, rollback.step), *range(31, STEPS + 1)]
    assert final_loss(ends[0]) == pytest.approx(final_loss(clean), rel=0.1)

    assert record_of(out, 2).rollbacks == (rollback,)
    assert record_of(out, 2).parent == manifest_key(1, 30)
    assert manifest_of(out, 2, STEPS).skipped == (SKIPPED,)
    assert manifest_key(1, 40) not in checkpoint_chain(read_listing(DirectoryStore(out)))
    assert ends[0].of(Finished)[0].checkpoint == manifest_key(2, STEPS)


def test_sharded_ranks_roll_back_through_s3(corpus: Path, clean: RankEnd) -> None:
    with moto() as environ:
        Bucket(environ, "runs").create()
        storage = {"s3": {"bucket": "runs", "prefix": "1", "endpoint": environ["AWS_ENDPOINT_URL"]}}
        checkpoint = Checkpoint.model_validate({"storage": storage, "interval": {"steps": EVERY}})
        config = a_job(corpus, Path("/unused"), training=SHARDED).model_copy(update={"checkpoint": checkpoint})
        ends = trained(config, 2, environ=environ)

    assert (rollback_of(ends).to_step, rollback_of(ends).skipped) == (30, SKIPPED)
    assert ends[0].of(Finished)[0].checkpoint == manifest_key(2, STEPS)
    assert final_loss(ends[0]) == pytest.approx(final_loss(clean), rel=0.1)


@pytest.mark.parametrize(
    ("killed", "stage", "workers"),
    [(0, "before the record", 2), (0, "after the record", 1), (1, "after the load", 2)],
)
def test_a_crash_in_the_middle_of_a_rollback_converges(
    corpus: Path, tmp_path: Path, rolled_back: tuple[Path, list[RankEnd]], killed: int, stage: str, workers: int
) -> None:
    """A coordinator gives the next generation the number that the ranks may have taken, and then a higher one."""
    config = a_job(corpus, tmp_path)
    survivors = trained(config, 2, deadly=(killed, stage))
    assert [end.exit_code for end in survivors] == [ExitCode.COLLECTIVE]

    number, ends = 2, trained(config, workers, generation=2)
    if stage != "before the record":
        assert ends[0].exit_code == ExitCode.NUMBER_TAKEN
        number, ends = 3, trained(config, workers, generation=ends[0].of(NumberTaken)[0].highest + 1)
        assert ends[0].of(Restored)[0].rollbacks == record_of(tmp_path, 2).rollbacks
        assert ends[0].of(Restored)[0].step == 30
        assert not ends[0].of(Diverged)

    last = record_of(tmp_path, 3 if stage == "before the record" else number)
    assert [(rollback.to_step, rollback.skipped) for rollback in last.rollbacks] == [(30, SKIPPED)]
    after = [step.loss for step in ends[0].steps][-(STEPS - 30) :]
    assert after == pytest.approx(rolled_back[1][0].losses[-(STEPS - 30) :], rel=1e-4)


REMEMBERED = 7
"""The newest multiple of it before the poison comes after the newest checkpoint."""


def remembering(corpus: Path, out: Path, **divergence: Any) -> tuple[TrainerConfig, dict[str, str]]:
    """A job that keeps states in memory, and the environment of the one worker that it is to run in."""
    (out / "memory").mkdir()
    config = a_job(corpus, out, **divergence)
    checkpoint = config.checkpoint.model_copy(update={"memory": Memory(every_steps=REMEMBERED)})
    return config.model_copy(update={"checkpoint": checkpoint}), {MEMORY_VARIABLE: str(out / "memory")}


@pytest.mark.parametrize("shard", [{}, SHARDED], ids=["plain", "sharded"])
def test_a_state_in_memory_from_before_the_trouble_saves_steps(
    corpus: Path, clean: RankEnd, tmp_path: Path, shard: dict[str, Any]
) -> None:
    config, environ = remembering(corpus, tmp_path, training=shard)

    ends = trained(config, 2, worker_size=2, environ=environ)

    rollback, record = rollback_of(ends), record_of(tmp_path, 2)
    assert (rollback.since, rollback.to_step, rollback.skipped) == (40, 35, SKIPPED)
    assert (record.parent, record.resumed) == (
        manifest_key(1, 30),
        MemoryState(generation=1, nonce=record_of(tmp_path, 1).nonce, step=35),
    )
    assert ends[0].of(RolledBack)[0].checkpoint == manifest_key(1, 30)
    assert ends[0].step_numbers == [*range(1, rollback.step), *range(36, STEPS + 1)]
    assert final_loss(ends[0]) == pytest.approx(final_loss(clean), rel=0.1)


def test_a_crash_after_a_rollback_to_memory_resumes_from_the_same_state(corpus: Path, tmp_path: Path) -> None:
    config, environ = remembering(corpus, tmp_path)
    trained(config, 2, worker_size=2, environ=environ, deadly=(1, "after the load"))

    ends = trained(config, 2, generation=3, worker_size=2, environ=environ)

    restored = ends[0].of(Restored)[0]
    assert (restored.step, restored.recalled, restored.skipped) == (35, True, (SKIPPED,))
    assert record_of(tmp_path, 3).resumed == record_of(tmp_path, 2).resumed
    assert not ends[0].of(Diverged)


def test_a_cap_ends_the_job_and_a_restart_does_not_lift_it(corpus: Path, tmp_path: Path) -> None:
    """One step of data skipped at a time is too little against eight that are poisoned."""
    config = a_job(corpus, tmp_path, skipSteps=1, maxRollbacks=2)

    ends = trained(config, 2)
    assert [end.exit_code for end in ends] == [ExitCode.DIVERGED] * 2
    failed = ends[0].of(Failed)[0]
    assert (failed.reason, failed.retryable) == ("Diverged", False)
    assert "2 rollbacks of recovery.divergence.maxRollbacks did not help (LossSpike at step" in failed.message
    assert [report.rollback.to_step for report in ends[0].of(RolledBack)] == [30, 20], "once more is once further back"

    again = trained(config, 1, generation=9)[0]
    assert again.exit_code == ExitCode.DIVERGED
    assert not again.of(RolledBack)


def test_too_high_a_learning_rate_is_lowered(corpus: Path, tmp_path: Path) -> None:
    """It rises to thirty times what is good for this model: the loss explodes near the end of the warm-up."""
    training = {
        "steps": 90,
        "optimizer": {"learningRate": 0.3, "clip": None},
        "schedule": {"kind": "constant", "warmupSteps": 60},
    }

    end = trained(a_job(corpus, tmp_path, "clean", training, skipSteps=50, learningRateFactor=0.1), 1)[0]

    assert end.exit_code == 0
    slowed = end.of(RolledBack)[0].rollback.slowed
    assert slowed is not None
    assert slowed.factor == 0.1
    assert end.steps[-1].learning_rate <= 0.3 * 0.1 + 1e-9
    assert final_loss(end) < 0.6 * end.losses[0]


def test_a_nan_is_never_in_the_weights(corpus: Path, clean: RankEnd, tmp_path: Path) -> None:
    """One rank's NaN is everybody's: the state before it is gone back to, and where no data is skipped, as if nothing
    had been."""
    ends = trained(a_job(corpus, tmp_path, "clean", skipSteps=0), 2, spoil=NanAt(step=33, rank=1))

    rollback = rollback_of(ends)
    assert (rollback.cause, rollback.step, rollback.since, rollback.to_step) == ("LossNotFinite", 33, 33, 30)
    assert ends[0].step_numbers == [*range(1, 33), *range(31, STEPS + 1)]
    assert ends[0].losses[32:] == pytest.approx(clean.losses[30:], rel=1e-4)


EXACT = {"exact": True, "steps": EVERY + 4}
OVERFLOW = 1e12
"""Times a loss it is finite, and its gradient is more than the fixed point holds."""


@pytest.mark.parametrize("shard", [{}, SHARDED], ids=["plain", "sharded"])
def test_exact_sums_that_are_not_finite_or_overflow_are_rolled_back(
    corpus: Path, tmp_path: Path, shard: dict[str, Any]
) -> None:
    undisturbed = trained(a_job(corpus, tmp_path / "calm", "clean", EXACT | shard), 2)[0]

    for name, factor in (("nan", math.nan), ("overflow", OVERFLOW)):
        config = a_job(corpus, tmp_path / name, "clean", EXACT | shard, skipSteps=0)
        ends = trained(config, 2, spoil=NanAt(step=EVERY + 2, rank=1, factor=factor))

        rollback = rollback_of(ends)
        assert (rollback.cause, rollback.step, rollback.to_step) == ("LossNotFinite", EVERY + 2, EVERY)
        assert ends[0].losses[: EVERY + 1] == undisturbed.losses[: EVERY + 1]
        assert ends[0].losses[EVERY + 1 :] == undisturbed.losses[EVERY:], "bit-equal, as if nothing had been"
        said = ends[0].of(Diverged)[0].message
        assert ("does not fit the fixed point of training.exact" in said) == (name == "overflow")


def test_before_the_first_checkpoint_a_rollback_restarts_at_step_0(corpus: Path, tmp_path: Path) -> None:
    config = a_job(corpus, tmp_path, "clean", SHARDED | {"steps": 4}, skipSteps=0)

    ends = trained(config, 2, spoil=NanAt(step=3, rank=0))

    assert rollback_of(ends).to_step == 0
    assert (
        ends[0].losses[2:] == trained(a_job(corpus, tmp_path / "other", "clean", SHARDED | {"steps": 4}), 2)[0].losses
    )
    assert record_of(tmp_path, 2).parent is None


def test_skip_drops_the_updates_of_bad_steps(corpus: Path, clean: RankEnd, tmp_path: Path) -> None:
    ends = trained(a_job(corpus, tmp_path, action="Skip"), 2)

    dropped = (StepRange(first=POISON.start, last=POISON.stop - 1),)
    assert manifest_of(tmp_path, 1, STEPS).dropped == dropped
    assert [report.step for report in ends[0].of(Diverged)] == list(POISON)
    assert ends[0].step_numbers == list(range(1, STEPS + 1))
    assert final_loss(ends[0]) == pytest.approx(final_loss(clean), rel=0.1)


def test_warn_continues_except_for_a_nan(corpus: Path, tmp_path: Path) -> None:
    ends = trained(a_job(corpus, tmp_path, action="Warn"), 2, spoil=NanAt(step=20, rank=1))

    said = [(report.step, report.cause, report.action) for report in ends[0].of(Diverged)]
    assert said[0] == (20, "LossNotFinite", "Drop")
    assert said[1][1:] == ("LossSpike", "Warn")
    assert manifest_of(tmp_path, 1, STEPS).dropped == (StepRange(first=20, last=20),)
    assert ends[0].step_numbers == [step for step in range(1, STEPS + 1) if step != 20]
    assert math.isfinite(ends[0].losses[-1])


def test_too_many_dropped_updates_end_the_job(corpus: Path, tmp_path: Path) -> None:
    end = trained(a_job(corpus, tmp_path, action="Skip", skipSteps=3), 1)[0]

    assert end.exit_code == ExitCode.DIVERGED
    assert "more than 3 steps in a row" in end.of(Failed)[0].message
