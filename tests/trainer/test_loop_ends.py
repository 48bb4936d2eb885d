"""Ends of a run that cannot continue."""

from pathlib import Path
from typing import Any

import pytest

from pretrain_api.messages.reports import Failed
from pretrain_api.messages.trainer_config import ExitCode
from support.trainer.world import a_config, a_corpus, losing_a_peer, run_ranks, run_training


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("parallelism", [{"shard": "none"}, {"shard": "full"}])
def test_a_lost_peer_is_a_collective_error(corpus: Path, parallelism: dict[str, str]) -> None:
    config = a_config(corpus, {"steps": 500, "parallelism": parallelism})

    end = run_ranks(2, losing_a_peer, config, survivors=[0])[0]

    assert end.exit_code == ExitCode.COLLECTIVE
    assert end.report.reason == "CollectiveError"
    assert end.report.retryable


def test_a_loss_that_is_not_finite_ends_the_run_on_all_ranks(corpus: Path) -> None:
    settings = {"optimizer": {"learningRate": 1e30, "clip": None}, "steps": 50}

    ends = run_training(a_config(corpus, settings, divergence={"maxRollbacks": 0}), 2)

    for end in ends:
        assert end.exit_code == ExitCode.DIVERGED
        assert (end.of(Failed)[0].reason, end.of(Failed)[0].retryable) == ("Diverged", False)


@pytest.mark.parametrize(
    ("training", "field"),
    [
        ({"precision": "fp8"}, "training.precision"),
        ({"parallelism": {"tensor": 2}, "exact": True}, "training.exact"),
        ({"parallelism": {"tensor": 2}}, "training.parallelism (tensor 2 x pipeline 1) takes 2 processes"),
    ],
)
def test_unsupported_settings_are_refused(corpus: Path, training: dict[str, Any], field: str) -> None:
    end = run_training(a_config(corpus, training), 1)[0]

    assert end.exit_code == ExitCode.INVALID
    assert end.of(Failed)[0].message.startswith(field)
    assert not end.of(Failed)[0].retryable
