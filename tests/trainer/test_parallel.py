"""One small case of each parallelism: the losses of one process; `make test-parallel` has them all."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch._dynamo.utils import counters

from pretrain_api.messages.reports import Restored
from pretrain_api.messages.trainer_config import ExitCode
from pretrain_trainer.loop import build
from support.trainer.parallel import GPT2, LLAMA, STEADY, Case, Laid, assert_same_training, run_cases, train_case
from support.trainer.world import RankEnd, a_corpus, run_ranks

ALONE = Laid()
TENSOR, PIPELINE = Laid(tensor=2, world_size=2), Laid(pipeline=2, world_size=4)
SHARDED_AND_TENSOR = Laid("full", tensor=2, world_size=4)
WAYS = (
    Laid("hybrid", world_size=4, worker_size=2),
    TENSOR,
    PIPELINE,
    Laid("full", pipeline=2, world_size=4),
    SHARDED_AND_TENSOR,
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
def test_with_every_option_each_has_the_losses_of_one_process_without_those_that_change_none(
    corpus: Path, tmp_path: Path
) -> None:
    """Dropout's masks are the same wherever they are drawn, and are drawn again in backward."""
    model = GPT2 | {"dropout": 0.2, "norm": "post"}
    common: dict[str, Any] = {"optimizer": STEADY}
    sparing = {"activationCheckpointing": "selective", "loss": {"chunk": 7}}
    ways = (TENSOR, PIPELINE, SHARDED_AND_TENSOR)

    cases = [
        ALONE.case(corpus, GPT2 | {"norm": "post"}, tmp_path / "without", **common),
        ALONE.case(corpus, model, tmp_path / "alone", **common),
    ]
    cases += [way.case(corpus, model, tmp_path / str(number), **common, **sparing) for number, way in enumerate(ways)]
    without, alone, *ends = run_cases(cases)

    assert alone.losses != pytest.approx(without.losses, rel=1e-3)
    for end in ends:
        assert_same_training(end, alone)


@pytest.mark.timeout(900)
def test_a_restart_at_the_same_size_changes_no_bit(corpus: Path, tmp_path: Path) -> None:
    ways = (Laid("full", world_size=3), TENSOR, PIPELINE, SHARDED_AND_TENSOR)
    model = GPT2 | {"dropout": 0.1}

    cases = [way.case(corpus, model, tmp_path / f"{number}") for number, way in enumerate(ways)]
    for number, way in enumerate(ways):
        folder = tmp_path / f"{number}-restarted"
        cases += [way.case(corpus, model, folder, 1, steps=3), way.case(corpus, model, folder, 2)]
    ends = run_cases(cases)

    for uninterrupted, before, after in zip(
        ends[: len(ways)], ends[len(ways) :: 2], ends[len(ways) + 1 :: 2], strict=True
    ):
        assert (before.step_numbers, after.step_numbers) == ([1, 2, 3], [4, 5, 6])
        assert numbers(before) + numbers(after) == numbers(uninterrupted)


@pytest.mark.usefixtures("cpp_compiler")
@pytest.mark.timeout(900)
def test_compiled_blocks_of_stages_have_the_losses_of_plain_ones(corpus: Path, tmp_path: Path) -> None:
    """With all of the compiler but its last part, which makes C++ of it (`make test-parallel`)."""
    common: dict[str, Any] = {"steps": 3, "evaluation": None, "sampling": None}
    way, model = Laid(pipeline=2, world_size=2), LLAMA | {"layers": 2}

    (alone,) = run_cases([ALONE.case(corpus, model, tmp_path / "alone", **common)])
    compiled = way.case(corpus, model, tmp_path / "compiled", **common, compile=True)
    end, graphs = run_ranks(way.world_size, _traced, compiled)[0]

    assert end.exit_code == 0, end.reports[-1]
    assert end.losses == pytest.approx(alone.losses, rel=1e-5)
    assert graphs > 0


def _traced(environ: Mapping[str, str], case: Case) -> tuple[RankEnd, int]:
    """(how it ended, how many graphs were made)."""
    build.compile_blocks = partial(build.compile_blocks, backend="aot_eager")
    return train_case(environ, case), counters["stats"]["unique_graphs"]


def numbers(end: RankEnd) -> list[tuple[float, float]]:
    return [(step.loss, step.grad_norm) for step in end.steps]


@pytest.mark.timeout(900)
def test_a_run_resumes_under_another_parallelism(corpus: Path, tmp_path: Path) -> None:
    """Names and shapes in a checkpoint are those of the whole model, whatever part of it a rank had."""
    shared = tmp_path / "shared"
    turns = (
        PIPELINE,
        Laid("full", world_size=3),
        TENSOR,
        SHARDED_AND_TENSOR,
        Laid("hybrid", pipeline=2, world_size=4, worker_size=2),
        Laid(),
    )
    cases = [ALONE.case(corpus, LLAMA, tmp_path / "alone", steps=12)]
    for number, way in enumerate(turns, 1):
        cases.append(way.case(corpus, LLAMA, shared, number, steps=2 * number))

    alone, *ends = run_cases(cases)

    assert [end.exit_code for end in ends] == [0] * len(turns)
    assert [end.of(Restored)[0].step for end in ends] == [0, 2, 4, 6, 8, 10]
    assert [loss for end in ends for loss in end.losses] == pytest.approx(alone.losses, rel=1e-5)


@pytest.mark.parametrize(
    ("way", "remedy"),
    [
        (
            Laid(tensor=2, pipeline=2, world_size=3),
            "takes 4 processes for each replica of the model, and 3 processes are no",
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
