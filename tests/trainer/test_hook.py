"""User-defined evaluations: their argument, their results, and their errors."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain_api.messages.reports import Evaluated, Failed
from pretrain_api.messages.trainer_config import ExitCode
from pretrain_trainer.evaluation.hook import undisturbed
from support.trainer import hooks
from support.trainer.parallel import GPT2, Laid, run_cases
from support.trainer.world import RankEnd, a_config, a_corpus, run_training

DROPOUT = {"family": "gpt2", "layers": 2, "heads": 2, "width": 32, "context": 16, "dropout": 0.1}
FILE = Path(hooks.__file__)
EXAMPLE = Path(__file__).parents[2] / "examples" / "evaluation_hook.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_corpus(tmp_path_factory.mktemp("corpus"))


def evaluation(corpus: Path, hook: str | None, every: int = 1) -> dict[str, Any]:
    source = {"name": "held-out", "uri": str(corpus / "held-out")}
    return {"every": every, "sequences": 4, "sources": [source], "hook": hook}


def trained(corpus: Path, ranks: int, hook: str | None, **training: Any) -> RankEnd:
    settings = {"model": DROPOUT, "steps": 3, "exact": True, "evaluation": evaluation(corpus, hook)}
    return run_training(a_config(corpus, settings | training), ranks)[0]


def test_it_gets_the_same_at_any_world_size_and_leaves_training_unchanged(corpus: Path) -> None:
    plain = trained(corpus, 2, None)

    by_module, alone, by_file = (
        trained(corpus, *of) for of in ((2, "support.trainer.hooks:looks"), (1, f"{FILE}:looks"), (3, f"{FILE}:looks"))
    )
    sharded = trained(corpus, 2, "support.trainer.hooks:looks", parallelism={"shard": "full"})

    said = [[item.metrics for item in end.of(Evaluated)] for end in (by_module, alone, by_file, sharded)]
    assert said[1:] == said[:1] * 3
    assert [item.problem for item in by_module.of(Evaluated)] == [""] * 3
    assert [metrics["tokens"] for metrics in said[0]] == [320, 640, 960]
    assert [metrics["rows"] for metrics in said[0]] == [61] * 3
    assert len({metrics["loss"] for metrics in said[0]}) == 3
    for end in (by_module, sharded):
        assert (end.losses, end.parameters) == (plain.losses, plain.parameters)
        assert [item.losses for item in end.of(Evaluated)] == [item.losses for item in plain.of(Evaluated)]


def test_the_example_is_one(corpus: Path) -> None:
    first, last = trained(corpus, 2, f"{EXAMPLE}:endings", steps=2).of(Evaluated)

    assert first.problem == last.problem == ""
    assert sorted(first.metrics) == ["endings/margin", "endings/right"]


def test_tensor_ranks_and_stages_get_the_results_of_one_process(corpus: Path, tmp_path: Path) -> None:
    laid = (
        Laid(),
        Laid(tensor=2, world_size=2),
        Laid(pipeline=2, world_size=4),
        Laid("full", pipeline=2, world_size=4),
    )
    cases = [
        one.case(
            corpus,
            GPT2,
            tmp_path / str(number),
            evaluation=evaluation(corpus, "support.trainer.hooks:laid_out", every=3),
        )
        for number, one in enumerate(laid)
    ]

    alone, *others = ([item.metrics for item in end.of(Evaluated)] for end in run_cases(cases))

    assert [sorted(metrics) for metrics in alone] == [["largest", "loss", "short"]] * 2
    for other in others:
        assert other == [pytest.approx(metrics, rel=1e-4) for metrics in alone]


def test_its_errors_are_reported_and_training_continues(corpus: Path) -> None:
    steps = 13
    plain = trained(corpus, 2, None, steps=steps)

    end = trained(corpus, 2, "support.trainer.hooks:errs", steps=steps)

    assert (end.exit_code, end.losses) == (0, plain.losses)
    said = [item.problem for item in end.of(Evaluated)]
    assert [text.partition(":")[0] for text in said[:2]] == ["KeyError", "ConnectionRefusedError"]
    for text, wanted in zip(
        said[2:],
        (
            "loss is nan, no finite number",
            "ranks called different methods of `trained`, or with different arguments",
            "ranks called different methods of `trained`, or with different arguments",
            "it returned a list: return a mapping",
            "it returned 33 metrics: return at most 32",
            "'a name' has no safe name",
            "text is 1.0, no finite number",
            "ValueError: tokens must be from 0 to ",
            "SystemExit: 3",
            "RuntimeError: on one rank, where the others call nothing",
            "",
        ),
        strict=True,
    ):
        assert wanted in text
    assert [item.metrics for item in end.of(Evaluated)] == [{}] * 12 + [{"good": 1.0}]


def test_random_generators_and_threads_are_restored() -> None:
    def seen() -> list[Any]:
        numbers = [torch.rand(1).item(), random.random(), np.random.rand(), torch.get_num_threads()]
        set_state(state)
        return numbers

    state = (torch.get_rng_state(), random.getstate(), np.random.get_state())
    before = seen()

    with undisturbed(torch.device("cpu")):
        torch.rand(7), random.random(), np.random.rand(7)
        torch.set_num_threads(torch.get_num_threads() + 1)

    assert seen() == before


def set_state(state: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ("no_such_module:evaluate", "no_such_module cannot be imported (ModuleNotFoundError"),
        ("/no/such/file.py:evaluate", "/no/such/file.py cannot be imported (FileNotFoundError"),
        ("support.trainer.hooks:evaluate", "support.trainer.hooks has no function evaluate"),
        ("support.trainer.hooks:SEQUENCES", "support.trainer.hooks has no function SEQUENCES"),
        ("BROKEN:evaluate", "cannot be imported (ZeroDivisionError: division by zero)"),
    ],
)
def test_one_that_cannot_be_imported_ends_the_run_at_once(corpus: Path, tmp_path: Path, hook: str, said: str) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")

    end = trained(corpus, 1, hook.replace("BROKEN", str(tmp_path / "broken.py")))

    assert end.exit_code == ExitCode.INVALID
    (failed,) = end.of(Failed)
    assert failed.message.startswith("training.evaluation.hook: ")
    assert said in failed.message
    assert len(end.reports) == 1
