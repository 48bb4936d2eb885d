"""One small case of each parallelism: the losses of one process; `make test-parallel` has them all."""

from pathlib import Path

import pytest
from builders_parallel import GPT2, LLAMA, Laid, assert_same_training, run_cases
from builders_trainer import a_corpus

from pretrain_api.reports import Restored
from pretrain_api.trainer import ExitCode

ALONE = Laid()
WAYS = (
    Laid("hybrid", world_size=4, worker_size=2),
    Laid(tensor=2, world_size=2),
    Laid(pipeline=2, world_size=4),
    Laid("full", pipeline=2, world_size=4),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.timeout(900)
def test_each_has_the_losses_of_one_process(corpus: Path, tmp_path: Path) -> None:
    ways = (ALONE, *WAYS)

    alone, *ends = run_cases([way.case(corpus, GPT2, tmp_path / str(number)) for number, way in enumerate(ways)])

    for end in ends:
        assert_same_training(end, alone)


@pytest.mark.timeout(900)
def test_a_run_goes_on_under_another_parallelism(corpus: Path, tmp_path: Path) -> None:
    """Names and shapes in a checkpoint are those of the whole model, whatever part of it a rank had."""
    shared = tmp_path / "shared"
    turns = (
        Laid(pipeline=2, world_size=4),
        Laid("full", world_size=3),
        Laid(tensor=2, world_size=2),
        Laid("hybrid", pipeline=2, world_size=4, worker_size=2),
        Laid(),
    )
    cases = [ALONE.case(corpus, LLAMA, tmp_path / "alone", steps=10)]
    for number, way in enumerate(turns, 1):
        cases.append(way.case(corpus, LLAMA, shared, number, steps=2 * number))

    alone, *ends = run_cases(cases)

    assert [end.exit_code for end in ends] == [0] * len(turns)
    assert [end.of(Restored)[0].step for end in ends] == [0, 2, 4, 6, 8]
    assert [loss for end in ends for loss in end.losses] == pytest.approx(alone.losses, rel=1e-5)


@pytest.mark.parametrize(
    ("way", "remedy"),
    [
        (Laid("full", tensor=2, world_size=2), "shards are not there yet with tensor parallelism"),
        (
            Laid(tensor=2, pipeline=2, world_size=3),
            "takes 4 processes for each replica of the model, of which 3 are no",
        ),
        (Laid("hybrid", pipeline=2, world_size=2, worker_size=1), "set workers.processesPerWorker to 2"),
    ],
)
def test_a_world_that_does_not_fit_is_refused_with_what_would(
    corpus: Path, tmp_path: Path, way: Laid, remedy: str
) -> None:
    (end,) = run_cases([way.case(corpus, GPT2, tmp_path)])

    assert end.exit_code == ExitCode.INVALID
    assert remedy in end.reports[-1].message
