"""Commands: all ranks commit a checkpoint at the same step and hold there."""

from pathlib import Path

import pytest

from pretrain_api.messages.protocol import Command
from pretrain_api.messages.reports import Held, Resumed, Saved, SaveFailed
from support.trainer.world import Script, a_corpus, run_training, saving_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_corpus(tmp_path_factory.mktemp("corpus"))


def a_command(name: str = "c1", hold: float = 0.05, generation: int = 1) -> Command:
    return Command(id=name, generation=generation, hold_seconds=hold)


def test_all_ranks_hold_at_the_first_step_at_which_one_knows_the_command(corpus: Path, tmp_path: Path) -> None:
    """Rank 1 hears it before step 3, rank 0 only before step 4: one checkpoint, one hold."""
    orders = {1: {3: (a_command(),)}, 0: {4: (a_command(),)}}

    ends = run_training(saving_run(corpus, tmp_path, every=100), 3, Script(keep=True, orders=orders))

    key = "checkpoints/g000001/step-000000003/manifest.json"
    for end in ends:
        assert end.of(Held) == [Held(command_id="c1", step=3, checkpoint=key)]
        assert end.of(Resumed) == [Resumed(command_id="c1", step=3)]
    assert [saved.step for saved in ends[0].of(Saved)] == [3, 6]
    assert ends[0].step_numbers == [1, 2, 3, 4, 5, 6]


def test_a_hold_joins_the_save_of_its_step(corpus: Path, tmp_path: Path) -> None:
    orders = {0: {4: (a_command(hold=0.0),)}}

    end = run_training(saving_run(corpus, tmp_path, every=4), 1, Script(keep=True, orders=orders))[0]

    assert [saved.step for saved in end.of(Saved)] == [4, 6]
    assert [held.step for held in end.of(Held)] == [4]
    assert not end.of(Resumed)


def test_two_commands_at_once_are_both_answered(corpus: Path, tmp_path: Path) -> None:
    orders = {0: {2: (a_command("a"),)}, 1: {2: (a_command("b"),)}}

    ends = run_training(saving_run(corpus, tmp_path), 2, Script(keep=True, orders=orders))

    assert [[held.command_id for held in end.of(Held)] for end in ends] == [["a", "b"]] * 2


def test_a_command_whose_save_fails_does_not_hold(corpus: Path, tmp_path: Path) -> None:
    orders = {0: {3: (a_command(),)}}

    end = run_training(saving_run(corpus, tmp_path, every=100), 2, Script(keep=True, orders=orders, failing=(3,)))[0]

    assert not end.of(Held)
    assert [failed.step for failed in end.of(SaveFailed)] == [3]
    assert end.step_numbers[-1] == 6


def test_commands_for_another_generation_are_ignored(corpus: Path, tmp_path: Path) -> None:
    orders = {0: {2: (a_command(generation=7),)}}

    assert not run_training(saving_run(corpus, tmp_path), 1, Script(keep=True, orders=orders))[0].of(Held)
