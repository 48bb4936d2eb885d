"""The steps that the loop saves, and its response to a save that fails."""

from pathlib import Path

import pytest

from pretrain_api.messages.reports import Failed, Finished, Saved, SaveFailed
from pretrain_api.messages.trainer_config import ExitCode
from pretrain_api.spec.job import Interval
from pretrain_trainer.loop.save_policy import SavePolicy
from support.trainer.world import Script, a_corpus, run_training, saving_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_corpus(tmp_path_factory.mktemp("corpus"))


def test_saves_come_at_the_interval_and_at_the_end(corpus: Path, tmp_path: Path) -> None:
    end = run_training(saving_run(corpus, tmp_path, every=4), 2, Script(keep=True))[0]

    assert [saved.step for saved in end.of(Saved)] == [4, 6]


def test_a_failed_save_is_reported_and_training_continues(corpus: Path, tmp_path: Path) -> None:
    end = run_training(saving_run(corpus, tmp_path), 1, Script(keep=True, failing=(4,)))[0]

    assert end.of(SaveFailed) == [SaveFailed(step=4, message="no space")]
    assert end.of(Finished)[0].step == 6


def test_a_final_save_that_fails_is_retried(corpus: Path, tmp_path: Path) -> None:
    end = run_training(saving_run(corpus, tmp_path), 2, Script(keep=True, failing=(6, 6)))[0]

    assert [failed.step for failed in end.of(SaveFailed)] == [6, 6]
    assert end.of(Finished)[0].checkpoint.endswith("step-000000006/manifest.json")


def test_a_run_whose_final_save_always_fails_fails(corpus: Path, tmp_path: Path) -> None:
    ends = run_training(saving_run(corpus, tmp_path), 2, Script(keep=True, failing=(6,) * 9))

    assert [end.exit_code for end in ends] == [ExitCode.FAILED, ExitCode.FAILED]
    assert ends[0].of(Failed)[0].reason == "FinalSaveFailed"
    assert ends[0].of(Failed)[0].retryable
    assert not ends[0].of(Finished)


def saved_steps(interval: Interval | None, count: int, stall: float = 0.0, seconds: float = 0.0) -> list[int]:
    """The steps that the policy saves, of steps that take a second each."""
    policy, saved = SavePolicy(interval), list[int]()
    for step in range(1, count + 1):
        if policy.due(step, now=float(step)):
            saved.append(step)
            policy = policy.restart(step, now=float(step)).after_stall(stall).after_save(seconds)
    return saved


def test_a_deferred_save_is_due_at_the_next_step() -> None:
    policy = SavePolicy(Interval(steps=10)).defer()

    assert policy.due(11, now=0.0)
    assert not policy.restart(11, now=0.0).due(12, now=0.0)


def test_a_duration_is_kept_by_the_clock() -> None:
    assert saved_steps(Interval.model_validate({"duration": "7s"}), 30) == [7, 14, 21, 28]


def test_without_an_interval_saves_come_every_50_steps() -> None:
    assert saved_steps(None, 170) == [50, 100, 150]


def test_without_an_interval_costly_saves_are_rarer() -> None:
    assert saved_steps(None, 400, stall=1.2) == [50, 170, 290]
    assert saved_steps(None, 400, seconds=70.0) == [50, 190, 330]
