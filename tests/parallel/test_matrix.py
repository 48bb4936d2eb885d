"""Every parallelism and their combinations, both families, at several sizes: the losses of one process.

Not in `make test`, which has one small case of each (tests/trainer/test_parallel.py): `make test-parallel`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from builders_parallel import GPT2, LLAMA, Case, Laid, assert_same_training, run_cases
from builders_trainer import RankEnd, a_corpus

ALONE = Laid()
FREE_HEAD = GPT2 | {"tiedHead": False, "bias": False}
SIZES = ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2))
"""Tensor and pipeline."""
RESHAPED = (
    Laid(),
    Laid("none", world_size=3),
    Laid("full", world_size=3),
    Laid("hybrid", world_size=4, worker_size=2),
    Laid(tensor=2, world_size=4),
    Laid(pipeline=4, world_size=4),
    Laid("full", pipeline=2, world_size=4),
    Laid(tensor=2, pipeline=2, world_size=4),
)


def ways(shard: str, most: int = 8) -> Iterator[Laid]:
    """Layouts of one to three replicas."""
    for tensor, pipeline in SIZES:
        for replicas in (1, 2, 3):
            world_size = tensor * pipeline * replicas
            if 1 < world_size <= most and (shard == "none" or tensor == 1):
                worker_size = world_size // 2 if shard == "hybrid" and replicas == 2 else world_size
                yield Laid(shard, tensor, pipeline, world_size, max(tensor * pipeline, worker_size))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("model", [GPT2, LLAMA, FREE_HEAD], ids=["gpt2", "llama", "free head"])
@pytest.mark.parametrize("shard", ["none", "full", "hybrid"])
def test_all_layouts_have_the_losses_of_one_process(
    corpus: Path, tmp_path: Path, model: Mapping[str, Any], shard: str
) -> None:
    laid = list(ways(shard))

    cases = [way.case(corpus, model, tmp_path / str(number)) for number, way in enumerate((ALONE, *laid))]
    alone, *ends = run_cases(cases)

    for way, end in zip(laid, ends, strict=True):
        print(way, worst(end, alone))
        assert_same_training(end, alone)


def test_bf16_comes_near_fp32(corpus: Path, tmp_path: Path) -> None:
    laid = [way for way in ways("full", 4) if way.world_size == 4] + list(ways("none", 4))

    cases = [way.case(corpus, GPT2, tmp_path / str(number)) for number, way in enumerate([ALONE])]
    cases += [
        way.case(corpus, GPT2, tmp_path / f"bf16-{number}", precision="bf16", steps=3)
        for number, way in enumerate(laid)
    ]
    alone, *ends = run_cases(cases)

    for end in ends:
        assert end.losses == pytest.approx(alone.losses[:3], rel=1e-2)


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_checkpoint_of_each_is_gone_on_with_by_each(corpus: Path, tmp_path: Path, model: Mapping[str, Any]) -> None:
    cases: list[Case] = [ALONE.case(corpus, model, tmp_path / "alone", steps=4)]
    for number, before in enumerate(RESHAPED):
        for other, after in enumerate(RESHAPED):
            folder = tmp_path / f"{number}-{other}"
            cases += [before.case(corpus, model, folder, 1, steps=2), after.case(corpus, model, folder, 2, steps=4)]

    alone, *ends = run_cases(cases)

    for before, after in zip(ends[::2], ends[1::2], strict=True):
        assert [*before.losses, *after.losses] == pytest.approx(alone.losses, rel=1e-5)


def worst(end: RankEnd, alone: RankEnd) -> float:
    """The greatest relative difference of a step's loss."""
    pairs = zip(end.losses, alone.losses, strict=False)
    return max((abs(mine - other) / other for mine, other in pairs), default=float("nan"))
