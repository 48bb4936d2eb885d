"""The loop: its reports, and resuming from checkpoints."""

from pathlib import Path
from typing import Any

import pytest

from pretrain_api.messages.reports import Finished, Progress, Restored
from pretrain_api.messages.trainer_config import TrainerConfig
from support.trainer.world import Script, a_config, a_corpus, run_training, saving_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_corpus(tmp_path_factory.mktemp("corpus"))


def test_a_restart_at_the_same_world_size_is_bit_equal(corpus: Path, tmp_path: Path) -> None:
    whole = run_training(a_config(corpus), 2)[0]
    config = saving_run(corpus, tmp_path)
    first = run_training(config.model_copy(update={"training": _cut(config, 4)}), 2, Script(keep=True))[0]
    second = run_training(config, 2, Script(keep=True, generation=2))[0]

    assert first.losses == whole.losses[:4]
    assert second.losses == whole.losses[4:]
    assert second.of(Restored)[0].step == 4
    assert second.of(Restored)[0].checkpoint == "checkpoints/g000001/step-000000004/manifest.json"


def test_other_world_sizes_resume_with_the_same_losses(corpus: Path, tmp_path: Path) -> None:
    whole = run_training(a_config(corpus), 1)[0]
    config = saving_run(corpus, tmp_path)
    losses = []
    for generation, (length, world_size) in enumerate(((2, 4), (4, 3), (6, 5)), start=1):
        part = config.model_copy(update={"training": _cut(config, length)})
        losses += run_training(part, world_size, Script(keep=True, generation=generation))[0].losses

    assert losses == pytest.approx(whole.losses, rel=1e-5)


def test_a_completed_run_finishes_again_without_a_step_or_a_save(corpus: Path, tmp_path: Path) -> None:
    config = saving_run(corpus, tmp_path)
    run_training(config, 1, Script(keep=True))
    again = run_training(config, 2, Script(keep=True, generation=2))[0]

    assert again.step_numbers == []
    assert again.of(Finished) == [
        Finished(step=6, tokens=6 * 20 * 16, checkpoint="checkpoints/g000001/step-000000006/manifest.json")
    ]


@pytest.mark.bare
def test_ranks_report_their_steps(corpus: Path) -> None:
    first, second = run_training(a_config(corpus), 2)

    assert first.of(Restored)[0].parameters == 28_032
    assert first.step_numbers == [1, 2, 3, 4, 5, 6]
    assert [step.tokens for step in first.steps] == [320, 640, 960, 1280, 1600, 1920]
    assert all(step.tokens_per_second > 0 and step.seconds > step.data_seconds for step in first.steps)
    assert [report.step for report in second.of(Progress)] == [1, 2, 3, 4, 5, 6]
    assert len(second.reports) == 6


@pytest.mark.parametrize("changes", [{}, {"exact": True}, {"parallelism": {"shard": "full"}}])
def test_the_ranks_contributions_add_up_to_the_loss(corpus: Path, changes: dict[str, Any]) -> None:
    first, second = run_training(a_config(corpus, changes), 2)

    contributions = [
        (mine.loss_contribution or 0.0) + (other.loss_contribution or 0.0)
        for mine, other in zip(first.steps, second.of(Progress), strict=True)
    ]
    assert contributions == pytest.approx(first.losses, rel=1e-5)
    assert all(report.seconds > report.data_seconds > 0 for report in second.of(Progress))


def test_only_a_first_generation_computes_the_unigram_loss(corpus: Path, tmp_path: Path) -> None:
    config = saving_run(corpus, tmp_path)
    run_training(config.model_copy(update={"training": _cut(config, 2)}), 1, Script(keep=True))
    later = run_training(config, 1, Script(keep=True, generation=2))[0]
    alone = run_training(config, 1, Script(keep=True, attended=False))[0]

    assert later.of(Restored)[0].unigram_loss is None
    assert alone.of(Restored)[0].unigram_loss is not None


def _cut(config: TrainerConfig, length: int) -> Any:
    """The training as if killed after `steps` steps: the schedule is constant and does not depend on the length."""
    return config.training.model_copy(update={"steps": length})
