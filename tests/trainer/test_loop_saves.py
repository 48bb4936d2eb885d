"""When the loop saves, and what it does when a save fails."""

from pathlib import Path

import pytest
from torch import nn
from torch.optim import SGD

import pretrain_trainer.core.progress
from pretrain_api.checkpoint.lineage import Manifest
from pretrain_api.messages.reports import Failed, Finished, Saved, SaveFailed
from pretrain_api.messages.trainer_config import ExitCode
from pretrain_api.spec.job import Interval
from pretrain_trainer.loop.save_policy import Saves
from support.trainer.world import Script, a_corpus, run_training, saving_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_corpus(tmp_path_factory.mktemp("corpus"))


def test_saves_come_at_the_interval_and_at_the_end(corpus: Path, tmp_path: Path) -> None:
    end = run_training(saving_run(corpus, tmp_path, every=4), 2, Script(keep=True))[0]

    assert [saved.step for saved in end.of(Saved)] == [4, 6]


def test_a_failed_save_is_told_and_training_goes_on(corpus: Path, tmp_path: Path) -> None:
    end = run_training(saving_run(corpus, tmp_path), 1, Script(keep=True, failing=(4,)))[0]

    assert end.of(SaveFailed) == [SaveFailed(step=4, message="no space")]
    assert end.of(Finished)[0].step == 6


def test_a_last_save_that_fails_is_tried_again(corpus: Path, tmp_path: Path) -> None:
    end = run_training(saving_run(corpus, tmp_path), 2, Script(keep=True, failing=(6, 6)))[0]

    assert [failed.step for failed in end.of(SaveFailed)] == [6, 6]
    assert end.of(Finished)[0].checkpoint.endswith("step-000000006/manifest.json")


def test_a_run_whose_last_save_never_works_fails(corpus: Path, tmp_path: Path) -> None:
    ends = run_training(saving_run(corpus, tmp_path), 2, Script(keep=True, failing=(6,) * 9))

    assert [end.exit_code for end in ends] == [ExitCode.FAILED, ExitCode.FAILED]
    assert ends[0].of(Failed)[0].reason == "FinalSaveFailed"
    assert ends[0].of(Failed)[0].retryable
    assert not ends[0].of(Finished)


class Timed:
    """A checkpointer whose saves take a given time of a fake clock."""

    parent: Manifest | None = None

    def __init__(self) -> None:
        self.now = 0.0
        self.stall = 0.0
        self.seconds = 0.0
        self.saved: list[int] = []

    def save(self, progress: pretrain_trainer.core.progress.Progress, model: nn.Module, optimizer: SGD) -> float:
        self.saved.append(progress.step)
        return self.stall

    def poll(self) -> tuple[Saved, ...]:
        return (Saved(step=self.saved[-1], checkpoint="", bytes=0, stall_seconds=0, seconds=self.seconds),)


def saved_steps(interval: Interval | None, count: int, stall: float = 0.0, seconds: float = 0.0) -> list[int]:
    """Steps of a second each that are saved after."""
    checkpointer, model = Timed(), nn.Linear(1, 1)
    checkpointer.stall, checkpointer.seconds = stall, seconds
    saves = Saves(checkpointer, model, SGD(model.parameters()), interval, lambda: checkpointer.now)  # pyright: ignore
    for step in range(1, count + 1):
        checkpointer.now += 1.0
        if saves.wanted(step):
            saves.begin(pretrain_trainer.core.progress.Progress(step))
            saves.outcomes()
    return checkpointer.saved


def test_a_duration_is_kept_by_the_clock() -> None:
    assert saved_steps(Interval.model_validate({"duration": "7s"}), 30) == [7, 14, 21, 28]


def test_without_an_interval_saves_come_every_50_steps() -> None:
    assert saved_steps(None, 170) == [50, 100, 150]


def test_without_an_interval_costly_saves_are_rarer() -> None:
    assert saved_steps(None, 400, stall=1.2) == [50, 170, 290]
    assert saved_steps(None, 400, seconds=70.0) == [50, 190, 330]
